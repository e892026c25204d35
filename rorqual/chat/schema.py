"""Arguments typed by the tool's JSON schema: what to expect of a parameter, and how its text becomes JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rorqual.chat.errors import ChatError

ALL_TYPES = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
WRAPPERS = ("arguments", "input")

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_LITERALS = {"True": "true", "False": "false", "None": "null"}


class Schemas:
    """The parameters of each tool of a request."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]):
        self._tools: dict[str, Mapping[str, Any]] = {}
        for n, tool in enumerate(tools):
            function = tool.get("function") if isinstance(tool, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise ChatError(f"tools[{n}].function", 'expected {"type": "function", "function": {"name": …}}')
            parameters = function.get("parameters")
            self._tools[function["name"]] = parameters if isinstance(parameters, Mapping) else {}

    def __contains__(self, tool: object) -> bool:
        return tool in self._tools

    def types(self, tool: str, parameter: str) -> frozenset[str]:
        """The JSON types that a parameter may have; all of them where the schema doesn't say."""
        return accepted_types(self._properties(tool).get(parameter))

    def may_be_wrapper(self, tool: str, parameter: str) -> bool:
        """Whether a parameter of this name could hold all arguments: it's `arguments` or `input`, and not the tool's own."""
        return parameter in WRAPPERS and bool(self._properties(tool)) and parameter not in self._properties(tool)

    def unwrapped(self, tool: str, text: str) -> str | None:
        """The JSON text of all arguments that a wrapper parameter holds; None where it doesn't fit the schema."""
        value = _loads(text)
        value = _loads(value) if isinstance(value, str) else value
        if not isinstance(value, dict):
            return None
        required = self._tools[tool].get("required") or []
        fits = value.keys() <= self._properties(tool).keys() and value.keys() >= set(required)
        return json.dumps(value, ensure_ascii=False) if fits else None

    def _properties(self, tool: str) -> Mapping[str, Any]:
        properties = self._tools.get(tool, {}).get("properties")
        return properties if isinstance(properties, Mapping) else {}


def accepted_types(schema: Any) -> frozenset[str]:
    """The JSON types that a schema accepts, from type, enum, const, anyOf and oneOf."""
    if not isinstance(schema, Mapping):
        return ALL_TYPES
    named = schema.get("type")
    if isinstance(named, str):
        found = frozenset([named])
    elif isinstance(named, list):
        found = frozenset(filter(lambda name: isinstance(name, str), named))
    elif choices := schema.get("anyOf") or schema.get("oneOf"):
        found = frozenset().union(*map(accepted_types, choices)) if isinstance(choices, list) else ALL_TYPES
    elif "enum" in schema or "const" in schema:
        values = schema.get("enum") if isinstance(schema.get("enum"), list) else [schema.get("const")]
        found = frozenset(map(_type_of, values or []))
    else:
        return ALL_TYPES
    return found & ALL_TYPES or ALL_TYPES


def typed(text: str, types: frozenset[str], string: bool | None) -> tuple[str, bool]:
    """(JSON text, whether the schema or the string attribute had to be overruled) of a parameter's text.

    string: the tag's attribute; None where it was missing, and the text decides. A value that no accepted type fits is
    kept: as it stands if it's JSON that was not called a string, else as a string.
    """
    found = _as_accepted(text, types, string)
    if found is not None:
        return found, string is None
    if string is not True:
        stripped = text.strip()
        plain = _LITERALS.get(stripped, stripped)
        if is_json(plain):
            return plain, types != ALL_TYPES or plain != stripped
    return json.dumps(text, ensure_ascii=False), True


def is_json(text: str) -> bool:
    return _loads(text) is not _BROKEN


def _as_accepted(text: str, types: frozenset[str], string: bool | None) -> str | None:
    if types == ALL_TYPES:
        return json.dumps(text, ensure_ascii=False) if string else (text.strip() if string is False and is_json(text) else None)
    stripped = text.strip()
    if "null" in types and stripped in ("null", "None"):
        return "null"
    if "string" in types and string:
        return json.dumps(text, ensure_ascii=False)
    return _as_scalar(stripped, types) or _as_container(stripped, types) or _as_string(text, types)


def _as_scalar(text: str, types: frozenset[str]) -> str | None:
    if "boolean" in types and text.lower() in ("true", "false"):
        return text.lower()
    if types & {"integer", "number"} and _NUMBER.fullmatch(text):
        return _number(text, types)
    return None


def _number(text: str, types: frozenset[str]) -> str | None:
    if re.fullmatch(r"-?[0-9]+", text):
        return text
    whole, _, fraction = text.partition(".")
    if re.fullmatch(r"-?[0-9]+", whole) and fraction and not fraction.strip("0"):
        return whole  # 5.0 -> 5
    if "number" in types:
        return text
    value = float(text)
    return str(int(value)) if abs(value) < 2**53 and value.is_integer() else None


def _as_container(text: str, types: frozenset[str]) -> str | None:
    value = _loads(text) if text[:1] in ("{", "[") else _BROKEN
    return text if value is not _BROKEN and _type_of(value) in types else None


def _as_string(text: str, types: frozenset[str]) -> str | None:
    if "string" not in types:
        return None
    is_quoted = isinstance(_loads(text), str)
    return text.strip() if is_quoted else json.dumps(text, ensure_ascii=False)


_BROKEN = object()


def _loads(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _BROKEN


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "object")
