"""Typed Python functions as tools: schemas from annotations, checked arguments, bounded results; a test's or a family's own.

A world's tools run in a process of their own (`rorqual.tasks.session`). A `Toolset` is the same surface over functions that
may run here: tools without a database behind them, foreign MCP servers, scripted tools in tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from rorqual.tasks import host
from rorqual.tasks.host import ToolError, schema_of

__all__ = ["ToolError", "Tools", "Toolset", "schema_of"]


class Tools(Protocol):
    """Something that has tools: a Toolset, a foreign MCP server, an opened world."""

    @property
    def tools(self) -> Sequence[dict[str, Any]]:
        """OpenAI-shaped definitions."""
        ...

    def observe(self, name: str, arguments: dict[str, Any]) -> str:
        """The observation of one call. Never raises for what a caller or a tool does wrong: it says {"error": ...}."""
        ...


class Toolset:
    """Functions of this process as tools."""

    def __init__(self, functions: Iterable[Callable[..., Any]], max_chars: int = host.MAX_OBSERVATION):
        self._functions = {function.__name__: (function, schema_of(function)) for function in functions}
        self.max_chars = max_chars

    @property
    def tools(self) -> list[dict[str, Any]]:
        return [schema for _, schema in self._functions.values()]

    def observe(self, name: str, arguments: dict[str, Any]) -> str:
        if name not in self._functions:
            return host.error_text("unknown_tool", f"there is no tool {name}")
        function, schema = self._functions[name]
        parameters = schema["function"]["parameters"]
        if problem := host.argument_problem(parameters, arguments):
            return host.error_text("invalid_arguments", problem)
        try:
            result = function(**host.as_declared(parameters, arguments))
            text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        except ToolError as error:
            return host.error_text(error.code, error.message)
        except Exception as error:
            return host.error_text("tool_failed", f"{type(error).__name__}: {error}"[:300])
        if len(text) > self.max_chars:
            return host.error_text("result_too_large", f"{len(text)} characters; narrow the request")
        return text
