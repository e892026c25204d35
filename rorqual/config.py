"""Frozen dataclasses <-> TOML recipes <-> `--a.b=c` overrides: the only parser.

A thin layer over pydantic, which validates plain dataclasses (nested, optional, literals, tuples) and reports every bad
field at once; tyro and jsonargparse stop at the first one, and both want to own the command line.

A config is a frozen dataclass that stands beside what it configures, checks its ranges in `__post_init__` with
`rorqual.errors.require`, and is never changed afterwards.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rorqual.errors import FieldErrors, UserError

RECIPES = Path(__file__).parent / "recipes"
NONE = "none"
C = TypeVar("C")


class ConfigError(UserError):
    """One line per bad field: file, field, what was found, what is accepted. `problems` holds the lines."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


def load(config_class: type[C], source: str | os.PathLike | None = None, overrides: Iterable[str] = (), table: str = "") -> C:
    """A config from a TOML file or the name of a shipped recipe, then `a.b=c` overrides (a leading `--` is allowed).

    table: the dotted name of the part of the file that configures this class; empty for the whole file.
    Raises ConfigError, which names the file (or the override), the field and the accepted values for every bad field.
    """
    path = find_recipe(source) if source is not None else None
    values = _table(_read(path), table, path) if path else {}
    origins: dict[tuple[str, ...], str] = {}
    for override in overrides:
        keys, value = parse_override(override)
        _set(values, keys, value, override)
        origins[keys] = f"override --{'.'.join(keys)}"
    return build(config_class, values, str(path or "defaults"), origins)


def build(
    config_class: type[C], values: Mapping[str, Any], where: str, origins: Mapping[tuple[str, ...], str] | None = None
) -> C:
    """A config from nested mappings. `where` names their source in errors; `origins` names it for single fields."""
    from pydantic import TypeAdapter, ValidationError

    problems = _unknown_fields(config_class, values, (), where, origins or {})
    try:
        config = TypeAdapter(config_class).validate_python(_with_nones(config_class, values))
    except ValidationError as error:
        raise ConfigError(problems + _validation_problems(error, config_class, where, origins or {})) from None
    if problems:
        raise ConfigError(problems)
    return config


def dump(config: Any) -> str:
    """The TOML text of a config; `load` of it gives the config back. TOML has no null: None is written as "none"."""
    import tomli_w

    return tomli_w.dumps(to_mapping(config))


def to_mapping(config: Any) -> dict[str, Any]:
    """Nested plain mappings: lists for tuples, strings for paths, "none" for None."""
    return _plain(dataclasses.asdict(config))


def find_recipe(source: str | os.PathLike) -> Path:
    """The path of a TOML file, or of the recipe shipped under that name."""
    path = Path(source)
    if path.is_file():
        return path
    shipped = RECIPES / f"{source}.toml"
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
    raise ConfigError([f"{source}: no such file or recipe; shipped recipes: {names or 'none'}"])


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """`--a.b=3` -> (("a", "b"), 3). The value is read as TOML where it is TOML (numbers, booleans, lists), else as a string."""
    name, equals, value = text.removeprefix("--").partition("=")
    if not equals or not name:
        raise ConfigError([f"override {text}: expected --field=value or --table.field=value"])
    return tuple(name.replace("-", "_").split(".")), _toml_value(value)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not valid TOML: {error}"]) from None


def _table(values: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    for key in filter(None, name.split(".")):
        if not isinstance(values.get(key), dict):
            raise ConfigError([f"{path}: has no table [{name}]; it has: {', '.join(sorted(values)) or 'nothing'}"])
        values = values[key]
    return values


def _set(values: dict[str, Any], keys: tuple[str, ...], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if values.get(key, NONE) == NONE:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise ConfigError([f"override {override}: {key} is a value, not a table"])
    values[keys[-1]] = value


def _unknown_fields(kind: Any, values: Any, at: tuple[str, ...], where: str, origins: Mapping) -> list[str]:
    """pydantic drops what a plain dataclass does not name; to a user that is a misspelt field."""
    if (held := _held_in(kind)) is not None:
        return [p for name, value in _members(values) for p in _unknown_fields(held, value, (*at, name), where, origins)]
    kind = _dataclass_in(kind)
    if kind is None or not isinstance(values, Mapping):
        return []
    fields, problems = _field_types(kind), []
    for name, value in values.items():
        loc = (*at, name)
        if name not in fields:
            problems.append(_problem(loc, where, origins, f"no such field; accepted: {', '.join(fields)}"))
        else:
            problems += _unknown_fields(fields[name], value, loc, where, origins)
    return problems


def _validation_problems(error: Any, config_class: type, where: str, origins: Mapping) -> list[str]:
    problems = []
    for item in error.errors():
        loc = tuple(str(part) for part in item["loc"] if not _is_type_label(part))
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, FieldErrors):
            problems += [_problem((*loc, name), where, origins, text) for name, text in inner.problems.items()]
        else:
            found = "" if item["type"] == "missing" else f", found {item['input']!r}"
            problems.append(_problem(loc, where, origins, item["msg"][0].lower() + item["msg"][1:] + found))
    return problems


def _is_type_label(part: Any) -> bool:
    """pydantic adds a label such as 'int' or 'tuple[int, ...]' for the member of a union; a user never wrote it."""
    return isinstance(part, str) and (part in ("int", "float", "str", "bool", "none") or "[" in part or part[:1].isupper())


def _problem(loc: tuple[str, ...], where: str, origins: Mapping, text: str) -> str:
    return f"{origins.get(loc, where)}: {'.'.join(loc) or 'the whole'}: {text}"


def _with_nones(kind: Any, values: Any) -> Any:
    """The values with "none" read as None in the fields that may be None."""
    if (held := _held_in(kind)) is not None:
        if isinstance(values, Mapping):
            return {name: _with_none(held, value) for name, value in values.items()}
        return [_with_none(held, value) for value in values] if isinstance(values, list | tuple) else values
    kind = _dataclass_in(kind)
    if kind is None or not isinstance(values, Mapping):
        return values
    fields = _field_types(kind)
    return {name: _with_none(fields.get(name), value) for name, value in values.items()}


def _with_none(kind: Any, value: Any) -> Any:
    return None if value == NONE and type(None) in typing.get_args(kind) else _with_nones(kind, value)


def _held_in(kind: Any) -> Any:
    """What a mapping by name, or a tuple of any length, holds; None for other types."""
    for each in typing.get_args(kind) if _is_union(kind) else (kind,):
        origin, inner = typing.get_origin(each), typing.get_args(each)
        if origin in (dict, Mapping) and len(inner) == 2:
            return inner[1]
        if origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
            return inner[0]
    return None


def _members(values: Any) -> list[tuple[str, Any]]:
    if isinstance(values, Mapping):
        return [(str(name), value) for name, value in values.items()]
    return [(str(place), value) for place, value in enumerate(values)] if isinstance(values, list | tuple) else []


def _is_union(kind: Any) -> bool:
    return isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union


def _dataclass_in(kind: Any) -> type | None:
    if dataclasses.is_dataclass(kind):
        return kind  # type: ignore[return-value]
    if _is_union(kind):
        return next(filter(None, map(_dataclass_in, typing.get_args(kind))), None)
    return None


def _field_types(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None:
        return NONE
    return str(value) if isinstance(value, os.PathLike) else value
