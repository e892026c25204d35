"""Mechanisms with real semantics, first part: booking, stock, orders, ledger, tickets."""

from __future__ import annotations

from typing import Any

from rorqual.synthesis.general.calculus import (
    Action,
    Adjust,
    Arg,
    Atom,
    Clause,
    Derived,
    Guard,
    Insert,
    Mechanism,
    Move,
    Param,
    Put,
    Table,
    choice,
    day,
    number,
    ref,
)


def thing(name: str, target: str = "") -> Param:
    return Param(name, "ref", target=target or name)


def amount(name: str, low: int, high: int) -> Param:
    return Param(name, "int", low=low, high=high)


def moved(name: str, said: str, what: str, before: tuple[str, ...], after: str, **rest: Any) -> Action:
    """An action on one row that takes its status from one of `before` to `after`. rest: the action's other fields."""
    return Action(name, said, (thing(what),), moves=(Move(what, "status", before, after),), **rest)


def at_least(path: str, minus: str, value: str, code: str) -> Guard:
    """path - minus >= the value of a parameter."""
    return Guard(Atom(path, ">=", Arg(value), minus=minus), code)


def same(path: str, other: str, code: str) -> Guard:
    return Guard(Atom(path, "==", Arg(other)), code)


BOOKING = Mechanism(
    "booking",
    "places that can be booked, with limited seats",
    tables=(
        Table(
            "slot",
            (
                ref("site"),
                day("start_date"),
                number("capacity", 4, 12),
                number("taken", 0, 0),
                number("price", 12, 240),
                choice("status", "open", "open", "open", "closed"),
            ),
            (18, 30),
            ("slot", "session", "opening"),
        ),
        Table(
            "booking",
            (ref("slot"), ref("party"), number("seats", 1, 3), choice("status", "confirmed", "confirmed", "cancelled")),
            (14, 26),
            ("booking", "reservation"),
        ),
    ),
    actions=(
        Action(
            "reserve",
            "book {seats} seats in {slot} for {party}",
            (thing("slot"), thing("party"), amount("seats", 1, 3)),
            guards=(Guard(Atom("slot.status", "==", "open"), "closed"), at_least("slot.capacity", "slot.taken", "seats", "full")),
            inserts=(
                Insert("booking", {"slot": Arg("slot"), "party": Arg("party"), "seats": Arg("seats"), "status": "confirmed"}),
            ),
            adjusts=(Adjust("slot", "taken", Arg("seats")),),
            verbs=("book", "make_reservation"),
        ),
        moved(
            "cancel_booking",
            "cancel {booking}",
            "booking",
            ("confirmed",),
            "cancelled",
            adjusts=(Adjust("booking.slot", "taken", Arg("booking.seats"), -1),),
            verbs=("cancel_reservation", "void_booking"),
        ),
    ),
    derived=(Derived("slot", "taken", "booking", "slot", value="seats", state="status", states=("confirmed",)),),
    options={
        "closing": {
            "actions": (
                moved(
                    "close_slot",
                    "close {slot}",
                    "slot",
                    ("open",),
                    "closed",
                    guards=(Guard(Atom("slot.taken", "==", 0), "has_bookings"),),
                    verbs=("shut_slot",),
                ),
            )
        },
        "length": {"columns": {"slot": (number("minutes", 20, 180),)}},
        "moving": {
            "actions": (
                Action(
                    "move_booking",
                    "move {booking} to {slot}",
                    (thing("booking"), thing("slot")),
                    guards=(
                        Guard(Atom("booking.status", "==", "confirmed"), "not_confirmed"),
                        Guard(Atom("slot.status", "==", "open"), "closed"),
                        at_least("slot.capacity", "slot.taken", "booking.seats", "full"),
                    ),
                    puts=(Put("booking", "slot", Arg("slot")),),
                    adjusts=(
                        Adjust("booking.slot", "taken", Arg("booking.seats"), -1),
                        Adjust("slot", "taken", Arg("booking.seats")),
                    ),
                    verbs=("rebook",),
                ),
            )
        },
    },
    clauses=(Clause("reserve", Atom("slot.price", "<=", 180)), Clause("cancel_booking", Atom("booking.seats", "<=", 2))),
)

STOCK = Mechanism(
    "stock",
    "stock on shelves, with every movement on record",
    tables=(
        Table(
            "shelf",
            (
                ref("site"),
                ref("item"),
                number("opening_stock", 10, 60),
                number("on_hand", 0, 0),
                number("reorder_at", 8, 40),
                number("counted", 5, 70),
            ),
            (18, 30),
            ("shelf", "bin", "stock_line"),
            is_distinct=("site", "item"),
        ),
        Table(
            "movement",
            (ref("shelf"), number("quantity", -6, 12), choice("reason", "receipt", "issue", "correction"), day("entry_date")),
            (16, 30),
            ("movement", "stock_entry"),
        ),
    ),
    actions=(
        Action(
            "receive",
            "receive {quantity} units into {shelf}",
            (thing("shelf"), amount("quantity", 2, 20)),
            inserts=(
                Insert("movement", {"shelf": Arg("shelf"), "quantity": Arg("quantity"), "reason": "receipt", "entry_date": ""}),
            ),
            adjusts=(Adjust("shelf", "on_hand", Arg("quantity")),),
            verbs=("restock", "take_in"),
        ),
        Action(
            "correct_stock",
            "post a correction of {quantity} to {shelf}",
            (thing("shelf"), amount("quantity", -60, 60)),
            inserts=(
                Insert(
                    "movement", {"shelf": Arg("shelf"), "quantity": Arg("quantity"), "reason": "correction", "entry_date": ""}
                ),
            ),
            adjusts=(Adjust("shelf", "on_hand", Arg("quantity")),),
            verbs=("adjust_stock",),
        ),
    ),
    derived=(Derived("shelf", "on_hand", "movement", "shelf", base="opening_stock", value="quantity"),),
    options={
        "level": {"columns": {"shelf": (number("rack", 1, 9),)}},
        "threshold": {
            "actions": (
                Action(
                    "raise_threshold",
                    "set the reorder point of {shelf} to {level}",
                    (thing("shelf"), amount("level", 41, 60)),
                    puts=(Put("shelf", "reorder_at", Arg("level")),),
                    verbs=("set_reorder_point",),
                ),
            )
        },
    },
    clauses=(Clause("receive", Atom("shelf.counted", "<=", 60)),),
)

ORDERS = Mechanism(
    "orders",
    "orders that are placed, shipped and returned",
    tables=(
        Table(
            "order",
            (
                ref("party"),
                ref("item"),
                number("quantity", 1, 9),
                number("unit_price", 5, 90),
                day("order_date"),
                choice("status", "placed", "shipped", "delivered", "cancelled", "returned"),
            ),
            (20, 34),
            ("order", "purchase", "requisition"),
        ),
    ),
    actions=(
        moved("ship", "ship {order}", "order", ("placed",), "shipped", verbs=("dispatch",)),
        moved("cancel_order", "cancel {order}", "order", ("placed",), "cancelled", verbs=("annul_order",)),
        moved("return_order", "take back {order}", "order", ("delivered",), "returned", verbs=("accept_return",)),
    ),
    options={
        "urgency": {"columns": {"order": (choice("urgency", "low", "normal", "high"),)}},
        "quantity": {
            "actions": (
                Action(
                    "change_quantity",
                    "change the quantity of {order} to {quantity}",
                    (thing("order"), amount("quantity", 10, 15)),
                    guards=(Guard(Atom("order.status", "==", "placed"), "too_late"),),
                    puts=(Put("order", "quantity", Arg("quantity")),),
                    verbs=("amend_order",),
                ),
            )
        },
    },
    clauses=(Clause("return_order", Atom("order.quantity", "<=", 7)), Clause("ship", Atom("order.unit_price", "<=", 75))),
)

LEDGER = Mechanism(
    "ledger",
    "accounts whose balances must equal their entries",
    tables=(
        Table(
            "account",
            (
                ref("party"),
                choice("currency", "EUR", "USD", "JPY"),
                number("opening_balance", 100, 900),
                number("balance", 0, 0),
                number("floor", 0, 80),
                choice("status", "active", "active", "frozen"),
            ),
            (16, 28),
            ("account", "wallet", "fund"),
        ),
        Table(
            "entry",
            (ref("account"), number("amount", -60, 90), choice("kind", "deposit", "withdrawal", "fee")),
            (18, 32),
            ("entry", "posting"),
        ),
    ),
    actions=(
        Action(
            "deposit",
            "pay {amount} into {account}",
            (thing("account"), amount("amount", 5, 95)),
            guards=(Guard(Atom("account.status", "==", "active"), "frozen"),),
            inserts=(Insert("entry", {"account": Arg("account"), "amount": Arg("amount"), "kind": "deposit"}),),
            adjusts=(Adjust("account", "balance", Arg("amount")),),
            verbs=("credit",),
        ),
        moved("freeze", "freeze {account}", "account", ("active",), "frozen", verbs=("suspend_account",)),
    ),
    derived=(Derived("account", "balance", "entry", "account", base="opening_balance", value="amount"),),
    options={
        "thawing": {"actions": (moved("thaw", "unfreeze {account}", "account", ("frozen",), "active", verbs=("reactivate",)),)},
        "interest": {"columns": {"account": (number("rate_bp", 0, 400),)}},
        "floors": {
            "actions": (
                Action(
                    "set_floor",
                    "set the floor of {account} to {level}",
                    (thing("account"), amount("level", 81, 120)),
                    puts=(Put("account", "floor", Arg("level")),),
                    verbs=("change_floor",),
                ),
            )
        },
    },
    clauses=(Clause("deposit", Atom("account.floor", "<=", 60)), Clause("freeze", Atom("account.opening_balance", "<=", 800))),
)

TICKETS = Mechanism(
    "tickets",
    "tickets that are assigned to desks and worked off",
    tables=(
        Table(
            "desk",
            (ref("staff"), ref("site"), number("limit", 4, 9), number("load", 0, 0)),
            (10, 16),
            ("desk", "queue", "team_desk"),
        ),
        Table(
            "ticket",
            (
                ref("item"),
                ref("desk", null_in=("new",)),
                number("severity", 1, 9),
                day("opening_date"),
                choice("status", "assigned", "assigned", "new", "new", "resolved", "closed"),
            ),
            (20, 34),
            ("ticket", "case", "incident"),
        ),
    ),
    actions=(
        Action(
            "assign",
            "assign {ticket} to {desk}",
            (thing("ticket"), thing("desk")),
            moves=(Move("ticket", "status", ("new",), "assigned"),),
            guards=(Guard(Atom("desk.load", "<", Arg("desk.limit")), "desk_full"),),
            puts=(Put("ticket", "desk", Arg("desk")),),
            adjusts=(Adjust("desk", "load", 1),),
            verbs=("route_ticket",),
        ),
        moved(
            "resolve",
            "resolve {ticket}",
            "ticket",
            ("assigned",),
            "resolved",
            adjusts=(Adjust("ticket.desk", "load", 1, -1),),
            verbs=("settle",),
        ),
        moved("close_ticket", "close {ticket}", "ticket", ("resolved",), "closed", verbs=("archive_ticket",)),
    ),
    derived=(Derived("desk", "load", "ticket", "desk", state="status", states=("assigned",)),),
    options={
        "handover": {
            "actions": (
                Action(
                    "hand_over",
                    "hand {ticket} over to {desk}",
                    (thing("ticket"), thing("desk")),
                    guards=(
                        Guard(Atom("ticket.status", "==", "assigned"), "not_assigned"),
                        Guard(Atom("desk.load", "<", Arg("desk.limit")), "desk_full"),
                    ),
                    puts=(Put("ticket", "desk", Arg("desk")),),
                    adjusts=(Adjust("ticket.desk", "load", 1, -1), Adjust("desk", "load", 1)),
                    verbs=("reassign",),
                ),
            )
        },
        "effort": {"columns": {"ticket": (number("effort", 1, 40),)}},
    },
    clauses=(Clause("assign", Atom("desk.limit", ">=", 5)), Clause("close_ticket", Atom("ticket.severity", "<=", 7))),
)

FIRST = (BOOKING, STOCK, ORDERS, LEDGER, TICKETS)
