"""The tools of a world, emitted as Python source: readers in several styles, one write tool for each action."""

from __future__ import annotations

from collections.abc import Sequence

from rorqual.synthesis.general.calculus import KEY, Action, Adjust, Arg, Atom, Clause, Column, Param, Table
from rorqual.synthesis.general.domain import Domain, prefix
from rorqual.tasks import digest

PRELUDE = """
def _row(table, key):
    found = db.execute(f'SELECT * FROM "{table}" WHERE id = ?', (key,)).fetchone()
    if found is None:
        raise ToolError("not_found", f"there is no {table} {key}")
    return dict(found)


def _page(found, page, size):
    rows = [dict(row) for row in found]
    start = (page - 1) * size
    more = start + size < len(rows)
    return {"rows": rows[start:start + size], "next_page": page + 1 if more else None}


def _need(holds, code, message):
    if not holds:
        raise ToolError(code, message)


def _is_busy(tool):
    left = db.execute('SELECT "left" FROM _busy WHERE tool = ?', (tool,)).fetchone()["left"]
    db.execute('UPDATE _busy SET "left" = max(0, "left" - 1) WHERE tool = ?', (tool,))
    return left > 0
"""
PYTHON_TYPES = {"int": "int", "enum": "str", "ref": "str", "text": "str", "date": "str", "label": "str"}


def plural(noun: str) -> str:
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith("f"):
        return noun[:-1] + "ves"
    return noun + ("es" if noun.endswith(("s", "ch", "x")) else "s")


def words(name: str) -> str:
    return name.replace("_", " ")


def schema(domain: Domain) -> list[str]:
    """CREATE TABLE statements, the host's own tables included."""
    types = {"int": "INTEGER"}
    statements = []
    for name, table in domain.tables.items():
        columns = [f'"{KEY}" TEXT PRIMARY KEY']
        columns += [f'"{c.name}" {types.get(c.kind, "TEXT")}{_references(c)}' for c in table.columns]
        statements.append(f'CREATE TABLE "{name}" ({", ".join(columns)})')
    return [
        *statements,
        "CREATE TABLE _ids (salt TEXT, given INTEGER)",
        'CREATE TABLE _busy (tool TEXT PRIMARY KEY, "left" INTEGER)',
    ]


def _references(column: Column) -> str:
    return f' REFERENCES "{column.target}"' if column.kind == "ref" else ""


def reader_names(domain: Domain, table: str) -> list[str]:
    """The tools that read a table, in the order in which they are needed."""
    style = domain.readers[table]
    if style == "keyed":
        return [f"list_{table}_ids", f"get_{table}"]
    if style == "by_parent":
        return [f"{plural(table)}_of_{parent_column(domain.tables[table]).name}"]
    return [f"search_{plural(table)}" if style == "search" else f"list_{plural(table)}"]


def parent_column(table: Table) -> Column:
    return next(column for column in table.columns if column.kind == "ref")


def settled_readers(domain: Domain) -> dict[str, str]:
    """The styles that the tables can bear: only a table that always refers to another can be read by it."""
    made = {}
    for name, style in domain.readers.items():
        table = domain.tables[name]
        has_parent = any(c.kind == "ref" for c in table.columns) and not parent_column(table).null_in
        made[name] = style if style != "by_parent" or has_parent else "list"
    return made


def reader_source(domain: Domain, table: str, page_len: int | None = None) -> str:
    """The tools that read one table."""
    style, size = domain.readers[table], page_len or domain.plan.page_len
    many, name = plural(table), words(table)
    if style == "keyed":
        return f'''

def list_{table}_ids() -> list:
    """The ids of all {words(many)}."""
    return [row["id"] for row in db.execute('SELECT id FROM "{table}" ORDER BY id')]


def get_{table}({table}: str) -> dict:
    """One {name} by its id."""
    return _row("{table}", {table})
'''
    if style == "by_parent":
        column = parent_column(domain.tables[table])
        return f'''

def {many}_of_{column.name}({column.name}: str, page: int = 1) -> dict:
    """The {words(many)} of one {words(column.name)}, page by page."""
    _row("{column.target}", {column.name})
    return _page(db.execute('SELECT * FROM "{table}" WHERE "{column.name}" = ? ORDER BY id', ({column.name},)), page, {size})
'''
    if style == "list":
        return f'''

def list_{many}(page: int = 1) -> dict:
    """All {words(many)}, page by page."""
    return _page(db.execute('SELECT * FROM "{table}" ORDER BY id'), page, {size})
'''
    return _search_source(domain.tables[table], many, size)


def filters(table: Table) -> list[Column]:
    """The columns by which a search tool filters, at most three."""
    return [c for c in table.columns if c.kind in ("label", "enum", "ref")][:3]


def _search_source(table: Table, many: str, size: int) -> str:
    columns = filters(table)
    parameters = ", ".join(f"{c.name}: str = ''" for c in columns)
    names = ", ".join(f'("{c.name}", {c.name})' for c in columns)
    return f'''

def search_{many}({parameters}, page: int = 1) -> dict:
    """The {words(many)} that match every filter given, page by page."""
    given = [(name, value) for name, value in [{names}] if value]
    where = " AND ".join(f'"{{name}}" = ?' for name, _ in given) or "1"
    found = db.execute(f'SELECT * FROM "{table.name}" WHERE {{where}} ORDER BY id', [value for _, value in given])
    return _page(found, page, {size})
'''


def count_source(table: Table) -> str:
    """A tool that counts rows by one reference or choice."""
    column = next((c for c in table.columns if c.kind in ("enum", "ref")), None)
    if column is None:
        return ""
    return f'''

def count_{plural(table.name)}({column.name}: str) -> dict:
    """How many {words(plural(table.name))} have this {words(column.name)}."""
    found = db.execute('SELECT count(*) AS n FROM "{table.name}" WHERE "{column.name}" = ?', ({column.name},)).fetchone()
    return {{"count": found["n"]}}
'''


def path_expression(domain: Domain, action: Action, path: str) -> str:
    """What a path from a parameter is worth in a tool: `_row("site", _row("slot", slot)["site"])["region"]`."""
    head, *rest = path.split(".")
    expression, table = head, action.param(head).target
    for part in rest:
        expression = f'_row("{table}", {expression})["{part}"]'
        column = domain.tables[table].column(part) if part != KEY else None
        table = column.target if column else table
    return expression


def value_expression(domain: Domain, action: Action, value: object) -> str:
    return path_expression(domain, action, value.path) if isinstance(value, Arg) else repr(value)


def condition(domain: Domain, action: Action, atom: Atom) -> str:
    left = path_expression(domain, action, atom.path)
    if atom.minus:
        left += f" - {path_expression(domain, action, atom.minus)}"
    return f"{left} {atom.op} {value_expression(domain, action, atom.value)}"


def action_source(domain: Domain, action: Action, name: str = "", enforced: Sequence[Clause] = (), is_flaky: bool = False) -> str:
    """One write tool: checks everything, computes everything, then writes."""
    name = name or action.name
    parameters = ", ".join(f"{p.name}: {PYTHON_TYPES[p.kind]}" for p in action.params)
    lines = [f"def {name}({parameters}) -> dict:", f'    """{_sentence(action)}"""']
    if is_flaky:
        lines += [
            f'    if _is_busy("{name}"):',
            '        return {"error": "temporarily_unavailable", "message": "try the same call again"}',
        ]
    lines += [f'    _row("{p.target}", {p.name})' for p in action.refs]
    lines += [_range_check(p) for p in action.params if p.kind == "int"]
    lines += _checks(domain, action, enforced)
    lines += _writes(domain, action)
    return "\n\n" + "\n".join(lines) + "\n"


def _sentence(action: Action) -> str:
    text = action.phrase
    for param in action.params:
        text = text.replace("{" + param.name + "}", param.name if param.kind != "ref" else f"the {words(param.name)}")
    return text[0].upper() + text[1:] + "."


def _range_check(param: Param) -> str:
    return f'    _need({param.low} <= {param.name} <= {param.high}, "out_of_range", "{param.name}: {param.low} to {param.high}")'


def _checks(domain: Domain, action: Action, enforced: Sequence[Clause]) -> list[str]:
    lines = []
    for move in action.moves:
        state = path_expression(domain, action, f"{move.param}.{move.column}")
        text = f"{words(move.param)} must be {' or '.join(move.origins)}"
        lines.append(f'    _need({state} in {move.origins!r}, "wrong_state", "{text}")')
    for guard in action.guards:
        lines.append(f'    _need({condition(domain, action, guard.atom)}, "{guard.code}", "{words(guard.code)}")')
    for clause in enforced:
        lines.append(f'    _need({condition(domain, action, clause.atom)}, "policy", "against the policy")')
    for absent in action.absent:
        where = " AND ".join(f'"{column}" = ?' for column in absent.match)
        values = ", ".join(value_expression(domain, action, value) for value in absent.match.values())
        query = f"db.execute('SELECT 1 FROM \"{absent.table}\" WHERE {where}', ({values},)).fetchone()"
        lines.append(f'    _need({query} is None, "{absent.code}", "it is there already")')
    for closed in action.closed:
        have = f'SELECT "{closed.node}" FROM "{closed.table}" WHERE "{closed.owner}" = ?'
        query = f'SELECT 1 FROM "{closed.edges}" WHERE "{closed.source}" = ? AND "{closed.target}" NOT IN ({have})'
        lines.append(f"    missing = db.execute('{query}', ({closed.node_param}, {closed.owner_param})).fetchone()")
        lines.append(f'    _need(missing is None, "{closed.code}", "something it requires is missing")')
    return lines


def _writes(domain: Domain, action: Action) -> list[str]:
    """Values first, since a write may change what a later value is read from."""
    values, writes = [], []

    def local(expression: str) -> str:
        values.append(f"    value_{len(values)} = {expression}")
        return f"value_{len(values) - 1}"

    for adjust in action.adjusts:
        table, key = _owner(domain, action, adjust)
        value = local(value_expression(domain, action, adjust.value))
        sign = "+" if adjust.sign > 0 else "-"
        update = f'UPDATE "{table}" SET "{adjust.column}" = "{adjust.column}" {sign} ? WHERE id = ?'
        writes.append(f"    db.execute('{update}', ({value}, {local(key)}))")
    for put in action.puts:
        table = action.param(put.param).target
        value = local(value_expression(domain, action, put.value))
        writes.append(f"""    db.execute('UPDATE "{table}" SET "{put.column}" = ? WHERE id = ?', ({value}, {put.param}))""")
    for move in action.moves:
        table = action.param(move.param).target
        writes.append(f"""    db.execute('UPDATE "{table}" SET "{move.column}" = ? WHERE id = ?', ({move.to!r}, {move.param}))""")
    result = '{"done": True}'
    for insert in action.inserts:
        columns = ", ".join(f'"{c}"' for c in (KEY, *insert.values))
        marks = ", ".join("?" * (1 + len(insert.values)))
        made = local(f'new_id("{prefix(insert.table)}")')
        given = ", ".join([made, *(local(value_expression(domain, action, v)) for v in insert.values.values())])
        writes.append(f"""    db.execute('INSERT INTO "{insert.table}" ({columns}) VALUES ({marks})', ({given},))""")
        result = f'{{"id": {made}}}' if domain.plan.bare_result else f'_row("{insert.table}", {made})'
    if not action.inserts and not domain.plan.bare_result:
        result = f'_row("{action.refs[0].target}", {action.refs[0].name})'
    return [*values, *writes, f"    return {result}"]


def _owner(domain: Domain, action: Action, adjust: Adjust) -> tuple[str, str]:
    head, *rest = adjust.path.split(".")
    table = action.param(head).target
    for part in rest:
        table = domain.tables[table].column(part).target
    return table, path_expression(domain, action, adjust.path)


def tools_source(domain: Domain, hidden: Sequence[str] = ()) -> str:
    """All tools of the world but the readers of `hidden` tables."""
    parts = [PRELUDE]
    parts += [reader_source(domain, table) for table in domain.tables if table not in hidden]
    parts += [count_source(domain.tables[table]) for table in domain.counted if table not in hidden]
    for action in domain.actions:
        enforced = [clause for clause in domain.clauses if clause.action == action.name and clause.is_enforced]
        parts.append(action_source(domain, action, enforced=enforced))
    return "".join(parts)


def world_payload(domain: Domain, rows: dict, seed: str, hidden: Sequence[str] = ()) -> dict:
    """What the host loads."""
    values = {
        name: [[row[KEY], *(row[c.name] for c in domain.tables[name].columns)] for row in found] for name, found in rows.items()
    }
    busy = [[action.name, 0] for action in domain.actions]
    return {
        "schema": schema(domain),
        "rows": {**values, "_ids": [[digest(seed), 0]], "_busy": busy},
        "keys": domain.keys,
        "source": tools_source(domain, hidden),
        "hidden": list(hidden),
    }
