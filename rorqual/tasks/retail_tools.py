# ruff: noqa: F821
"""The tools of the tau2 retail world, written from its policy and its data. This text runs in a world's host, which gives it
`db`, `new_id` and `ToolError`; records are JSON documents in one column.

The tools enforce what the policy states of an order's status, of items, and of payment; what it asks of the conversation
(authentication, confirmation) is the agent's to keep.
"""

from __future__ import annotations

import ast
import json
import operator
import sqlite3
from typing import Any, Literal

db: sqlite3.Connection
ToolError: Any

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def _load(table: str, key: str) -> dict:
    found = db.execute(f"SELECT record FROM {table} WHERE id = ?", (key,)).fetchone()
    if found is None:
        raise ToolError("not_found", f"{table}: {key}")
    return json.loads(found["record"])


def _save(table: str, key: str, record: dict) -> None:
    db.execute(f"UPDATE {table} SET record = ? WHERE id = ?", (json.dumps(record), key))


def _need(holds: bool, code: str, message: str = "") -> None:
    if not holds:
        raise ToolError(code, message)


def _order(order_id: str, *statuses: str) -> dict:
    order = _load("orders", order_id)
    _need(order["status"] in statuses, "wrong_status", f"{order_id} is {order['status']}")
    return order


def _method(user: dict, payment_method_id: str) -> dict:
    _need(payment_method_id in user["payment_methods"], "no_such_payment_method", payment_method_id)
    return user["payment_methods"][payment_method_id]


def _is_gift_card(method: dict) -> bool:
    return method["source"] == "gift_card"


def _pay(order: dict, user: dict, payment_method_id: str, amount: float) -> None:
    """Record a payment (amount above 0) or a refund, and move a gift card's balance at once."""
    method = _method(user, payment_method_id)
    if _is_gift_card(method):
        _need(method["balance"] >= amount, "balance_too_low", payment_method_id)
        method["balance"] = round(method["balance"] - amount, 2)
    kind = "payment" if amount > 0 else "refund"
    order["payment_history"].append(
        {"transaction_type": kind, "amount": round(abs(amount), 2), "payment_method_id": payment_method_id}
    )


def _taken(order: dict, item_ids: list) -> list:
    """The items of an order that the ids name; an id given twice names two items."""
    left = list(order["items"])
    found = []
    for item_id in item_ids:
        item = next((item for item in left if item["item_id"] == item_id), None)
        _need(item is not None, "not_in_order", item_id)
        left.remove(item)
        found.append(item)
    return found


def _replaced(order: dict, item_ids: list, new_item_ids: list) -> tuple[list, float]:
    """Pairs of an order's items and the variants that replace them, and what they cost more."""
    _need(len(item_ids) == len(new_item_ids) > 0, "lists_differ", "as many new items as old ones")
    pairs, difference = [], 0.0
    for item, new_id in zip(_taken(order, item_ids), new_item_ids, strict=True):
        variants = _load("products", item["product_id"])["variants"]
        _need(new_id in variants, "other_product", f"{new_id} is no variant of {item['name']}")
        _need(variants[new_id]["available"], "not_available", new_id)
        pairs.append((item, variants[new_id]))
        difference += variants[new_id]["price"] - item["price"]
    return pairs, round(difference, 2)


def find_user_id_by_email(email: str) -> str:
    """The id of the user with this email address."""
    for row in db.execute("SELECT id, record FROM users"):
        if json.loads(row["record"])["email"].lower() == email.lower():
            return row["id"]
    raise ToolError("not_found", email)


def find_user_id_by_name_zip(first_name: str, last_name: str, zip: str) -> str:
    """The id of the user with this name and zip code."""
    wanted = (first_name.lower(), last_name.lower(), zip)
    for row in db.execute("SELECT id, record FROM users"):
        user = json.loads(row["record"])
        if (user["name"]["first_name"].lower(), user["name"]["last_name"].lower(), user["address"]["zip"]) == wanted:
            return row["id"]
    raise ToolError("not_found", f"{first_name} {last_name}, {zip}")


def get_user_details(user_id: str) -> dict:
    """A user's profile, with payment methods and orders."""
    return _load("users", user_id)


def get_order_details(order_id: str) -> dict:
    """An order with its items, status and payments. Ids begin with '#'."""
    return _load("orders", order_id)


def get_product_details(product_id: str) -> dict:
    """A type of product with all its variants. The id of one of its items finds it too."""
    if db.execute("SELECT 1 FROM products WHERE id = ?", (product_id,)).fetchone() is None:
        product_id = get_item_details(product_id)["product_id"]
    return _load("products", product_id)


def get_item_details(item_id: str) -> dict:
    """One variant of a product, by its item id."""
    for row in db.execute("SELECT record FROM products"):
        product = json.loads(row["record"])
        if item_id in product["variants"]:
            return {"name": product["name"], "product_id": product["product_id"], **product["variants"][item_id]}
    raise ToolError("not_found", item_id)


def list_all_product_types() -> dict:
    """The names of all types of products, with their product ids."""
    records = (json.loads(row["record"]) for row in db.execute("SELECT record FROM products"))
    return {record["name"]: record["product_id"] for record in records}


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / and brackets, rounded to two places."""
    try:
        return str(round(_value(ast.parse(expression, mode="eval").body), 2))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError) as error:
        raise ToolError("not_an_expression", str(error)) from None


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    raise ValueError("only numbers, + - * / and brackets")


def transfer_to_human_agents(summary: str) -> str:
    """Hand the user over to a human agent.

    summary: what the user wants
    """
    return "transferred"


def cancel_pending_order(order_id: str, reason: Literal["no longer needed", "ordered by mistake"]) -> dict:
    """Cancel a pending order and refund it."""
    order = _order(order_id, "pending")
    user = _load("users", order["user_id"])
    for payment in list(order["payment_history"]):
        _pay(order, user, payment["payment_method_id"], -payment["amount"])
    order["status"], order["cancel_reason"] = "cancelled", reason
    _save("orders", order_id, order)
    _save("users", order["user_id"], user)
    return order


def modify_pending_order_address(
    order_id: str, address1: str, address2: str, city: str, state: str, country: str, zip: str
) -> dict:
    """Change the shipping address of a pending order."""
    order = _order(order_id, "pending", "pending (item modified)")
    address = dict(address1=address1, address2=address2, city=city, state=state, country=country, zip=zip)
    order["address"] = address
    _save("orders", order_id, order)
    return order


def modify_pending_order_payment(order_id: str, payment_method_id: str) -> dict:
    """Pay a pending order by another method; the first one is refunded."""
    order = _order(order_id, "pending", "pending (item modified)")
    user = _load("users", order["user_id"])
    _need(len(order["payment_history"]) == 1, "paid_more_than_once", order_id)
    (first,) = order["payment_history"]
    _need(first["payment_method_id"] != payment_method_id, "same_payment_method", payment_method_id)
    _pay(order, user, payment_method_id, first["amount"])
    _pay(order, user, first["payment_method_id"], -first["amount"])
    _save("orders", order_id, order)
    _save("users", order["user_id"], user)
    return order


def modify_pending_order_items(order_id: str, item_ids: list[str], new_item_ids: list[str], payment_method_id: str) -> dict:
    """Replace items of a pending order by other variants of the same products. Can be done once for an order."""
    order = _order(order_id, "pending")
    user = _load("users", order["user_id"])
    _method(user, payment_method_id)
    pairs, difference = _replaced(order, item_ids, new_item_ids)
    if difference:
        _pay(order, user, payment_method_id, difference)
    for item, variant in pairs:
        item.update(item_id=variant["item_id"], price=variant["price"], options=variant["options"])
    order["status"] = "pending (item modified)"
    _save("orders", order_id, order)
    _save("users", order["user_id"], user)
    return order


def return_delivered_order_items(order_id: str, item_ids: list[str], payment_method_id: str) -> dict:
    """Ask for the return of items of a delivered order; the refund goes to the method first paid with or to a gift card."""
    order = _order(order_id, "delivered")
    method = _method(_load("users", order["user_id"]), payment_method_id)
    is_first = payment_method_id == order["payment_history"][0]["payment_method_id"]
    _need(is_first or _is_gift_card(method), "wrong_payment_method", payment_method_id)
    _taken(order, item_ids)
    order.update(status="return requested", return_items=sorted(item_ids), return_payment_method_id=payment_method_id)
    _save("orders", order_id, order)
    return order


def exchange_delivered_order_items(order_id: str, item_ids: list[str], new_item_ids: list[str], payment_method_id: str) -> dict:
    """Ask for the exchange of items of a delivered order for other variants of the same products."""
    order = _order(order_id, "delivered")
    method = _method(_load("users", order["user_id"]), payment_method_id)
    _, difference = _replaced(order, item_ids, new_item_ids)
    _need(not _is_gift_card(method) or method["balance"] >= difference, "balance_too_low", payment_method_id)
    order.update(
        status="exchange requested",
        exchange_items=sorted(item_ids),
        exchange_new_items=sorted(new_item_ids),
        exchange_payment_method_id=payment_method_id,
        exchange_price_difference=difference,
    )
    _save("orders", order_id, order)
    return order


def modify_user_address(user_id: str, address1: str, address2: str, city: str, state: str, country: str, zip: str) -> dict:
    """Change a user's default address."""
    user = _load("users", user_id)
    user["address"] = dict(address1=address1, address2=address2, city=city, state=state, country=country, zip=zip)
    _save("users", user_id, user)
    return user
