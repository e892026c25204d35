"""The process that holds a world's database, and the only handle on it: tools run here, and agents reach them by lines of JSON.

This file is also a script that stands alone: it is copied into a sandbox as it is, so it imports the standard library only.
Each request is one line, each reply is one line:

    {"op": "load", "schema": [sql], "rows": {table: [[value]]}, "keys": {table: column}, "source": [python]}  -> {"tools": [...]}
    {"op": "reset"}                               -> {"digest": hex}        the database, byte for byte as loaded
    {"op": "call", "name": ..., "arguments": {}}  -> {"observation": text, "changes": rows}
    {"op": "replay", "calls": [[name, {}], ...]}  -> {"observations": [], "changes": [], "delta": []}   from a reset
    {"op": "delta"}                               -> {"delta": [[table, key, row or null], ...]}
    {"op": "digest"}                              -> {"digest": hex}

Every public function of the source is a tool: its annotations give the JSON schema, its docstring the description (the first
paragraph) and those of the parameters (lines `name: text`). A function sees `db`, a sqlite3 connection with named rows,
`new_id(prefix)`, and `ToolError(code, message)`. A call that raises leaves no trace in the database.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sqlite3
import sys
import types
import typing

MAX_OBSERVATION = 64 * 1024
"""Characters; a longer result is answered by an error, so that no tool can flood its caller."""
JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
PYTHON_TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}


class ToolError(Exception):
    """What a tool says when it refuses: a code to act on, and a sentence."""

    def __init__(self, code, message=""):
        self.code = code
        self.message = message
        super().__init__(f"{code}: {message}")


def schema_of(function):
    """The OpenAI-shaped definition of a typed Python function."""
    hints = typing.get_type_hints(function)
    description, parameters = split_docstring(inspect.getdoc(function) or "")
    properties, required = {}, []
    for name, parameter in inspect.signature(function).parameters.items():
        properties[name] = type_schema(hints.get(name, str))
        if name in parameters:
            properties[name]["description"] = parameters[name]
        if parameter.default is inspect.Parameter.empty:
            required.append(name)
    schema = {"type": "object", "properties": properties, "required": required}
    definition = {"name": function.__name__, "description": description, "parameters": schema}
    return {"type": "function", "function": definition}


def split_docstring(text):
    """The first paragraph in one line, and the lines `name: text` after it."""
    head, _, rest = text.partition("\n\n")
    pairs = (line.strip().partition(": ") for line in rest.splitlines())
    return " ".join(head.split()), {name: value for name, colon, value in pairs if colon and name.isidentifier()}


def type_schema(hint):
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return type_schema(next(a for a in arguments if a is not type(None)))
    if origin is typing.Literal:
        return {"type": JSON_TYPES[type(arguments[0])], "enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": type_schema(arguments[0])}
    return {"type": JSON_TYPES.get(origin or hint, "string")}


def argument_problem(schema, arguments):
    """What is wrong with the arguments of a call in one sentence, or None. An integral float passes for an integer."""
    if not isinstance(arguments, dict):
        return "arguments must be an object"
    properties = schema["properties"]
    for name in schema["required"]:
        if name not in arguments:
            return f"missing argument: {name}"
    for name, value in arguments.items():
        if name not in properties:
            return f"unknown argument: {name}"
        if not (value is None and name not in schema["required"]) and not fits(properties[name], value):
            return f"argument {name}: expected {json.dumps(properties[name].get('enum') or properties[name]['type'])}"
    return None


def fits(schema: dict, value: typing.Any) -> bool:
    if isinstance(value, bool) and schema["type"] != "boolean":
        return False
    if schema["type"] == "integer" and isinstance(value, float) and value.is_integer():
        return True
    if not isinstance(value, PYTHON_TYPES[schema["type"]]):
        return False
    if "enum" in schema:
        return value in schema["enum"]
    elements: typing.Any = value
    return schema["type"] != "array" or all(fits(schema.get("items", {"type": "string"}), item) for item in elements)


def as_declared(schema, arguments):
    """Integral floats as integers; arguments that are null are left out."""
    properties = schema["properties"]
    given = {name: value for name, value in arguments.items() if value is not None}
    return {name: int(v) if properties[name]["type"] == "integer" and isinstance(v, float) else v for name, v in given.items()}


class Host:
    """One database, the tools over it, and what each call changed."""

    def handle(self, request):
        return getattr(self, "op_" + request["op"])(**{k: v for k, v in request.items() if k != "op"})

    def op_load(self, schema, rows, keys, source):
        self.db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self.db.row_factory = sqlite3.Row
        self.keys = keys
        self.db.execute("BEGIN")
        for statement in schema:
            self.db.execute(statement)
        for table, values in rows.items():
            if values:
                self.db.executemany(f'INSERT INTO "{table}" VALUES ({",".join("?" * len(values[0]))})', values)
        self.db.execute("COMMIT")
        self.image = self.db.serialize()
        self.columns = {}
        self.initial = self.rows()
        self.tools = self.functions(source)
        return {"tools": self.schemas()}

    def functions(self, source):
        """name -> (function, schema). Later texts see what earlier ones define, and may define it anew."""
        space = {"db": self.db, "ToolError": ToolError, "new_id": self.new_id, "__name__": "tools"}
        for text in source:
            exec(compile(text, "<tools>", "exec"), space)
        own = {name: f for name, f in space.items() if isinstance(f, types.FunctionType) and f.__module__ == "tools"}
        return {name: (f, schema_of(f)) for name, f in own.items() if not name.startswith("_")}

    def new_id(self, prefix):
        """An id that can't be guessed from others: from the database's salt and the number of ids given since the reset."""
        salt, count = self.db.execute("SELECT salt, given FROM _ids").fetchone()
        self.db.execute("UPDATE _ids SET given = given + 1")
        return prefix + hashlib.sha256(f"{salt}/{count}".encode()).hexdigest()[:6].upper()

    def schemas(self):
        return [schema for _, schema in self.tools.values()]

    def op_describe(self):
        return {"tools": self.schemas()}

    def op_reset(self):
        self.db.deserialize(self.image)
        return {}

    def op_digest(self):
        return {"digest": hashlib.sha256(self.db.serialize()).hexdigest()}

    def op_call(self, name, arguments):
        before = self.db.total_changes
        observation = self.observe(name, arguments)
        return {"observation": observation, "changes": self.db.total_changes - before}

    def observe(self, name, arguments):
        if name not in self.tools:
            return error_text("unknown_tool", f"there is no tool {name}")
        function, schema = self.tools[name]
        parameters = schema["function"]["parameters"]
        if problem := argument_problem(parameters, arguments):
            return error_text("invalid_arguments", problem)
        # Not a savepoint for total_changes' sake: a refused call must leave the bytes as they were.
        self.db.execute("BEGIN")
        try:
            text = json.dumps(function(**as_declared(parameters, arguments)), ensure_ascii=False)
        except BaseException as error:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            if isinstance(error, ToolError):
                return error_text(error.code, error.message)
            return error_text("tool_failed", f"{type(error).__name__}: {error}"[:300])
        if self.db.in_transaction:
            self.db.execute("COMMIT")
        if len(text) > MAX_OBSERVATION:
            return error_text("result_too_large", f"{len(text)} characters; narrow the request")
        return text

    def op_replay(self, calls):
        self.op_reset()
        replies = [self.op_call(name, arguments) for name, arguments in calls]
        return {
            "observations": [reply["observation"] for reply in replies],
            "changes": [reply["changes"] for reply in replies],
            "delta": self.delta(),
        }

    def op_delta(self):
        return {"delta": self.delta()}

    def op_rows(self):
        named = {t: [dict(zip(self.columns[t], row, strict=True)) for row in rows] for t, rows in self.initial.items()}
        return {"rows": named}

    def rows(self):
        """table -> its rows as tuples; tables whose names start with _ are the host's own."""
        cursor = self.db.cursor()
        cursor.row_factory = None
        found = {}
        for table in self.keys:
            if not table.startswith("_"):
                found[table] = cursor.execute(f'SELECT * FROM "{table}"').fetchall()
                self.columns[table] = [column[0] for column in cursor.description]
        return found

    def delta(self):
        changes = []
        for table, now in self.rows().items():
            if now != self.initial[table]:
                changes += self.changes(table, now)
        return changes

    def changes(self, table, now):
        names = self.columns[table]
        place = names.index(self.keys[table])
        before, after = ({row[place]: row for row in rows} for rows in (self.initial[table], now))
        made = [[table, key, dict(zip(names, row, strict=True))] for key, row in after.items() if before.get(key) != row]
        return made + [[table, key, None] for key in before if key not in after]


def error_text(code, message):
    return json.dumps({"error": code, "message": message}, ensure_ascii=False)


def serve(handler, lines, write):
    """Answer each line of a stream. A request that fails is answered by {"failure": text}; the server lives on."""
    for line in lines:
        try:
            reply = handler.handle(json.loads(line))
        except Exception as error:
            reply = {"failure": f"{type(error).__name__}: {error}"[:2000]}
        write(json.dumps(reply, ensure_ascii=False) + "\n")


def write_line(text):
    OUT.write(text)
    OUT.flush()


if __name__ == "__main__":
    # Tools may print: what they print must not be taken for a reply.
    OUT, sys.stdout = sys.stdout, sys.stderr
    serve(Host(), sys.stdin, write_line)
