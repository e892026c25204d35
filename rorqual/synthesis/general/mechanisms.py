"""Mechanisms with real semantics, first half: booking, stock, orders, ledger, tickets, enrolment, routes, approval."""

from __future__ import annotations

from rorqual.synthesis.general.calculus import (
    Absent,
    Action,
    Adjust,
    Arg,
    Atom,
    Clause,
    Closed,
    Closure,
    Derived,
    Guard,
    Insert,
    Mechanism,
    Move,
    Param,
    Path,
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
        Action(
            "cancel_booking",
            "cancel {booking}",
            (thing("booking"),),
            moves=(Move("booking", "status", ("confirmed",), "cancelled"),),
            adjusts=(Adjust("booking.slot", "taken", Arg("booking.seats"), -1),),
            verbs=("cancel_reservation", "void_booking"),
        ),
    ),
    derived=(Derived("slot", "taken", "booking", "slot", value="seats", state="status", states=("confirmed",)),),
    options={
        "closing": {
            "actions": (
                Action(
                    "close_slot",
                    "close {slot}",
                    (thing("slot"),),
                    moves=(Move("slot", "status", ("open",), "closed"),),
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
        Action(
            "ship",
            "ship {order}",
            (thing("order"),),
            moves=(Move("order", "status", ("placed",), "shipped"),),
            verbs=("dispatch",),
        ),
        Action(
            "cancel_order",
            "cancel {order}",
            (thing("order"),),
            moves=(Move("order", "status", ("placed",), "cancelled"),),
            verbs=("annul_order",),
        ),
        Action(
            "return_order",
            "take back {order}",
            (thing("order"),),
            moves=(Move("order", "status", ("delivered",), "returned"),),
            verbs=("accept_return",),
        ),
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
        Action(
            "freeze",
            "freeze {account}",
            (thing("account"),),
            moves=(Move("account", "status", ("active",), "frozen"),),
            verbs=("suspend_account",),
        ),
    ),
    derived=(Derived("account", "balance", "entry", "account", base="opening_balance", value="amount"),),
    options={
        "thawing": {
            "actions": (
                Action(
                    "thaw",
                    "unfreeze {account}",
                    (thing("account"),),
                    moves=(Move("account", "status", ("frozen",), "active"),),
                    verbs=("reactivate",),
                ),
            )
        },
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
        Action(
            "resolve",
            "resolve {ticket}",
            (thing("ticket"),),
            moves=(Move("ticket", "status", ("assigned",), "resolved"),),
            adjusts=(Adjust("ticket.desk", "load", 1, -1),),
            verbs=("settle",),
        ),
        Action(
            "close_ticket",
            "close {ticket}",
            (thing("ticket"),),
            moves=(Move("ticket", "status", ("resolved",), "closed"),),
            verbs=("archive_ticket",),
        ),
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

REQUIRES_COURSE = Closed("prerequisite", "course", "requires", "enrolment", "party", "course", "party", "course")
ENROLMENT = Mechanism(
    "enrolment",
    "courses with prerequisites and limited places",
    tables=(
        Table(
            "course",
            (ref("item"), number("places", 6, 14), number("enrolled", 0, 0), number("credits", 1, 12), day("start_date")),
            (14, 22),
            ("course", "module", "training"),
        ),
        Table(
            "prerequisite",
            (ref("course"), ref("requires", "course")),
            (10, 16),
            ("prerequisite", "course_requirement"),
            is_distinct=("course", "requires"),
        ),
        Table(
            "enrolment",
            (ref("party"), ref("course")),
            (12, 20),
            ("enrolment", "registration"),
            is_distinct=("party", "course"),
        ),
    ),
    actions=(
        Action(
            "enrol",
            "enrol {party} in {course}",
            (thing("party"), thing("course")),
            guards=(Guard(Atom("course.enrolled", "<", Arg("course.places")), "full"),),
            absent=(Absent("enrolment", {"party": Arg("party"), "course": Arg("course")}),),
            closed=(REQUIRES_COURSE,),
            inserts=(Insert("enrolment", {"party": Arg("party"), "course": Arg("course")}),),
            adjusts=(Adjust("course", "enrolled", 1),),
            verbs=("register",),
            is_bulk=False,
        ),
    ),
    derived=(Derived("course", "enrolled", "enrolment", "course"),),
    options={
        "room": {"columns": {"course": (ref("site"),)}},
        "places": {
            "actions": (
                Action(
                    "extend_places",
                    "raise the places of {course} to {places}",
                    (thing("course"), amount("places", 15, 24)),
                    puts=(Put("course", "places", Arg("places")),),
                    verbs=("enlarge_course",),
                ),
            )
        },
    },
    clauses=(Clause("enrol", Atom("course.credits", "<=", 10)),),
    plans=(Closure("enrol", REQUIRES_COURSE),),
)

ROUTES = Mechanism(
    "routes",
    "consignments that travel over legs between places",
    tables=(
        Table(
            "leg",
            (ref("origin", "site"), ref("destination", "site"), number("minutes", 15, 400), number("cost", 4, 120)),
            (26, 38),
            ("leg", "link", "connection"),
            is_distinct=("origin", "destination"),
        ),
        Table(
            "consignment",
            (ref("party"), ref("location", "site"), number("weight", 1, 80), choice("status", "waiting", "held", "waiting")),
            (12, 18),
            ("consignment", "shipment", "parcel"),
        ),
        Table("hop", (ref("consignment"), ref("leg")), (6, 12), ("hop", "leg_record")),
    ),
    actions=(
        Action(
            "send",
            "send {consignment} over {leg}",
            (thing("consignment"), thing("leg")),
            guards=(
                Guard(Atom("consignment.status", "==", "waiting"), "held"),
                same("leg.origin", "consignment.location", "wrong_place"),
            ),
            puts=(Put("consignment", "location", Arg("leg.destination")),),
            inserts=(Insert("hop", {"consignment": Arg("consignment"), "leg": Arg("leg")}),),
            verbs=("forward_over", "dispatch_leg"),
            is_bulk=False,
        ),
        Action(
            "hold",
            "hold {consignment}",
            (thing("consignment"),),
            moves=(Move("consignment", "status", ("waiting",), "held"),),
            verbs=("stop_consignment",),
        ),
    ),
    options={
        "release": {
            "actions": (
                Action(
                    "release",
                    "release {consignment}",
                    (thing("consignment"),),
                    moves=(Move("consignment", "status", ("held",), "waiting"),),
                    verbs=("let_go",),
                ),
            )
        },
        "carrier": {"columns": {"leg": (choice("carrier", "rail", "road", "air", "sea"),)}},
    },
    clauses=(Clause("hold", Atom("consignment.weight", ">=", 10)),),
    plans=(Path("send", "consignment", "leg", "leg", "origin", "destination", "location", ("cost", "minutes")),),
)

APPROVAL = Mechanism(
    "approval",
    "requests that climb an approval chain",
    tables=(
        Table(
            "approver",
            (ref("staff"), number("limit", 100, 900), choice("desk_state", "available", "available", "away")),
            (8, 14),
            ("approver", "signatory"),
        ),
        Table(
            "request",
            (
                ref("party"),
                number("amount", 40, 800),
                day("filing_date"),
                ref("approver", null_in=("submitted",)),
                choice("status", "submitted", "submitted", "approved", "rejected"),
            ),
            (20, 32),
            ("request", "claim", "application"),
        ),
    ),
    actions=(
        Action(
            "approve",
            "have {request} approved by {approver}",
            (thing("request"), thing("approver")),
            moves=(Move("request", "status", ("submitted",), "approved"),),
            guards=(
                Guard(Atom("approver.desk_state", "==", "available"), "away"),
                Guard(Atom("approver.limit", ">=", Arg("request.amount")), "above_limit"),
            ),
            puts=(Put("request", "approver", Arg("approver")),),
            verbs=("sign_off",),
        ),
        Action(
            "reject",
            "reject {request}",
            (thing("request"),),
            moves=(Move("request", "status", ("submitted",), "rejected"),),
            verbs=("turn_down",),
        ),
    ),
    options={
        "appeal": {
            "actions": (
                Action(
                    "reopen",
                    "reopen {request}",
                    (thing("request"),),
                    moves=(Move("request", "status", ("rejected",), "submitted"),),
                    verbs=("hear_appeal",),
                ),
            )
        },
        "risk": {"columns": {"request": (number("risk", 1, 99),)}},
    },
    clauses=(Clause("approve", Atom("approver.limit", "<=", 850)), Clause("reject", Atom("request.amount", ">=", 80))),
)

FIRST = (BOOKING, STOCK, ORDERS, LEDGER, TICKETS, ENROLMENT, ROUTES, APPROVAL)
