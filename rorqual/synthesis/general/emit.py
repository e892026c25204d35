"""Solution and verification functions, generated as Python from the goal formula.

The solution calls tools and computes. The verifier evaluates the same formula over the initial rows, states which rows must be
new and which columns must have which value, demands that derived columns equal their definitions, and that nothing else changed
(the frame condition). It never sees the solution's trace.
"""

from __future__ import annotations

from rorqual.synthesis.general.calculus import Action, Arg, Atom, Closure, Path
from rorqual.synthesis.general.domain import Domain
from rorqual.synthesis.general.goals import Ask, Const, Diff, Goal, Pick, Selector, Step
from rorqual.synthesis.general.surface import parent_column, reader_names

VERIFIER_PRELUDE = """
def closure(edges, source, target, have, node):
    needed, waiting = [], [node]
    while waiting:
        current = waiting.pop()
        if current not in have and current not in needed:
            needed.append(current)
            waiting += [edge[target] for edge in edges if edge[source] == current]
    return needed


def cheapest(edges, source, target, cost, start, goal):
    paths = {start: (0, [])}
    is_settled = False
    while not is_settled:
        is_settled = True
        for edge in edges:
            if edge[source] in paths:
                total, way = paths[edge[source]]
                if edge[target] not in paths or total + edge[cost] < paths[edge[target]][0]:
                    paths[edge[target]] = (total + edge[cost], way + [edge["id"]])
                    is_settled = False
    return paths[goal][1]


def same_answer(given, expected):
    if given is None:
        return False
    left, right = str(given).strip().strip(".").casefold(), str(expected).strip().casefold()
    try:
        return float(left.replace(",", "")) == float(right)
    except ValueError:
        return left == right


def invariant(rows, table, column, child, ref, base, value, state, states):
    for row in rows[table]:
        children = [c for c in rows[child] if c[ref] == row["id"] and (not states or c[state] in states)]
        total = (row[base] if base else 0) + sum(c[value] if value else 1 for c in children)
        if row[column] != total:
            return [f"{table} {row['id']}: {column} is {row[column]}, its definition gives {total}"]
    return []


def frame(initial, final, new, puts, free):
    reasons = []
    for table, rows in initial.items():
        before, after = {r["id"]: r for r in rows}, {r["id"]: r for r in final[table]}
        reasons += [f"{table} {key} is gone" for key in before if key not in after]
        added = [{k: v for k, v in row.items() if k != "id"} for key, row in after.items() if key not in before]
        missing = [row for name, row in new if name == table]
        for row in added:
            if row in missing:
                missing.remove(row)
            else:
                reasons.append(f"{table}: a row that was not asked for")
        reasons += [f"{table}: a row is missing" for _ in missing]
        for key, row in before.items():
            for column in row:
                if (table, column) not in free and key in after:
                    expected = puts.get((table, key, column), row[column])
                    if after[key][column] != expected:
                        reasons.append(f"{table} {key}: {column} is {after[key][column]!r}, expected {expected!r}")
    return reasons
"""


class Formula:
    """Renders the parts of a goal as Python over `tables` (name -> rows) and `by` (name -> key -> row)."""

    def __init__(self, domain: Domain, goal: Goal):
        self.domain, self.goal = domain, goal

    def path(self, table: str, row: str, path: str) -> str:
        """`row` is an expression for a row of the table; e.g. by["site"][r["site"]]["region"]."""
        parts = path.split(".")
        expression = row
        for i, part in enumerate(parts):
            expression = f'{expression}["{part}"]'
            if i + 1 < len(parts):
                table = self.domain.tables[table].column(part).target
                expression = f'by["{table}"][{expression}]'
        return expression

    def value(self, table: str, value: object, step: int) -> str:
        if not isinstance(value, Arg):
            return repr(value)
        head, _, rest = value.path.partition(".")
        if head == "self":
            return self.path(table, "r", rest)
        if head.startswith("step"):
            other, _, rest = rest.partition(".")
            return self.variable(int(head[4:]), other, rest)
        return self.variable(step, head, rest)

    def variable(self, step: int, param: str, path: str = "") -> str:
        """A parameter of a step: the key or constant, or what a path from it is worth."""
        name = f"s{step}_{param}"
        if not path:
            return name
        table = self.target(step, param)
        return self.path(table, f'by["{table}"][{name}]', path)

    def target(self, step: int, param: str) -> str:
        value = self.goal.steps[step].args.get(param)
        return (
            value.selector.table
            if isinstance(value, Pick)
            else self.domain.action(self.goal.steps[step].action).param(param).target
        )

    def atom(self, table: str, atom: Atom, step: int) -> str:
        left = self.path(table, "r", atom.path)
        if atom.minus:
            left += f" - {self.path(table, 'r', atom.minus)}"
        return f"{left} {atom.op} {self.value(table, atom.value, step)}"

    def rows(self, selector: Selector, step: int) -> str:
        """The rows that satisfy a selector's atoms."""
        conditions = " and ".join(self.atom(selector.table, atom, step) for atom in selector.all_atoms)
        return f'[r for r in tables["{selector.table}"]' + (f" if {conditions}]" if conditions else "]")

    def best(self, selector: Selector, step: int) -> str:
        """The row that comes first."""
        rows = self.rows(selector, step)
        if not selector.order:
            return f"{rows}[0]"
        if selector.tie:
            rows = f"sorted({rows}, key=lambda r: {self.path(selector.table, 'r', selector.tie)})"
        order = self.path(selector.table, "r", selector.order)
        return f"{'max' if selector.is_max else 'min'}({rows}, key=lambda r: {order})"

    def ask(self, ask: Ask) -> str:
        last = len(self.goal.steps) - 1
        if ask.kind == "value":
            return self.path(ask.selector.table, self.best(ask.selector, last), ask.column)
        rows = self.rows(ask.selector, last)
        if ask.kind == "count":
            return f"len({rows})"
        return f"{ask.kind}({self.path(ask.selector.table, 'r', ask.column)} for r in {rows})"

    def bindings(self, i: int, step: Step) -> list[str]:
        lines = []
        for name, value in step.args.items():
            if isinstance(value, Const):
                lines.append(f"s{i}_{name} = {value.value!r}")
            elif isinstance(value, Pick):
                lines.append(f's{i}_{name} = {self.best(value.selector, i)}["id"]')
        return lines

    def row_bindings(self, i: int, step: Step) -> list[str]:
        """Inside the loop of an each: the target, and what is computed from the row in hand."""
        assert step.each is not None
        lines = [f's{i}_{step.target} = it["id"]']
        for name, value in step.args.items():
            if isinstance(value, Diff):
                column, minus = (self.path(step.each.table, "it", p) for p in (value.column, value.minus))
                lines.append(f"s{i}_{name} = {column} - {minus}")
        return lines

    def used_tables(self) -> list[str]:
        """The tables that the formula reads, parents of by_parent readers included."""
        used: dict[str, None] = {}
        for i, step in enumerate(self.goal.steps):
            for selector in [step.each, *(v.selector for v in step.args.values() if isinstance(v, Pick))]:
                if selector:
                    self._use(selector, i, used)
            for plan in self.domain.plans:
                if plan.action == step.action and step.kind in ("closure", "path"):
                    names = [plan.closed.edges, plan.closed.table] if isinstance(plan, Closure) else [plan.edges]
                    used.update(dict.fromkeys(names))
        if self.goal.ask:
            self._use(self.goal.ask.selector, len(self.goal.steps) - 1, used)
            self._walk(self.goal.ask.selector.table, self.goal.ask.column, used)
        for table in list(used):
            self._parents(table, used)
        return list(used)

    def _use(self, selector: Selector, step: int, used: dict[str, None]) -> None:
        used[selector.table] = None
        paths = [p for atom in selector.all_atoms for p in (atom.path, atom.minus)]
        for path in [*paths, selector.order, selector.tie]:
            self._walk(selector.table, path, used)
        for atom in selector.all_atoms:
            if isinstance(atom.value, Arg) and "." in atom.value.path:
                head, _, rest = atom.value.path.partition(".")
                if head == "self":
                    self._walk(selector.table, rest, used)
                elif not head.startswith("step"):
                    self._walk(self.target(step, head), rest, used)

    def _walk(self, table: str, path: str, used: dict[str, None]) -> None:
        for part in path.split(".")[:-1]:
            table = self.domain.tables[table].column(part).target
            used[table] = None

    def _parents(self, table: str, used: dict[str, None]) -> None:
        if self.domain.readers[table] == "by_parent":
            parent = parent_column(self.domain.tables[table]).target
            if parent not in used:
                used[parent] = None
                self._parents(parent, used)


def solution_source(domain: Domain, goal: Goal) -> str:
    """A solution that reads what the formula needs through the tools, computes, writes through the tools, and returns."""
    formula = Formula(domain, goal)
    lines = ["def solution(tools):", *_indented(_reading(domain, formula))]
    for i, step in enumerate(goal.steps):
        lines += _indented(_solution_step(domain, formula, i, step))
    if goal.ask:
        lines.append(f"    return str({formula.ask(goal.ask)})")
    return "\n".join(lines) + "\n"


def _indented(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]


def _reading(domain: Domain, formula: Formula) -> list[str]:
    used = formula.used_tables()
    lines = ["tables = {}"]
    waiting = sorted(used, key=lambda name: _depth(domain, name))
    if any(domain.readers[name] != "keyed" for name in waiting):
        lines += [
            "def pages(read):",
            "    rows, page = [], 1",
            "    while page:",
            "        found = read(page)",
            '        rows += found["rows"]',
            '        page = found["next_page"]',
            "    return rows",
        ]
    for name in waiting:
        lines += _read_table(domain, name)
    return [*lines, 'by = {name: {r["id"]: r for r in rows} for name, rows in tables.items()}']


def _depth(domain: Domain, table: str) -> int:
    """How many tables must be read before this one."""
    if domain.readers[table] != "by_parent":
        return 0
    return 1 + _depth(domain, parent_column(domain.tables[table]).target)


def _read_table(domain: Domain, table: str) -> list[str]:
    names = reader_names(domain, table)
    if domain.readers[table] == "keyed":
        return [f'tables["{table}"] = [tools.{names[1]}({table}=key) for key in tools.{names[0]}()]']
    if domain.readers[table] == "by_parent":
        column = parent_column(domain.tables[table])
        return [
            f'tables["{table}"] = []',
            f'for parent in tables["{column.target}"]:',
            f'    tables["{table}"] += pages(lambda page: tools.{names[0]}({column.name}=parent["id"], page=page))',
        ]
    return [f'tables["{table}"] = pages(lambda page: tools.{names[0]}(page=page))']


def _solution_step(domain: Domain, formula: Formula, i: int, step: Step) -> list[str]:
    action = domain.action(step.action)
    lines = formula.bindings(i, step)
    if step.kind == "each":
        assert step.each is not None
        lines.append(f"for it in {formula.rows(step.each, i)}:")
        return lines + _indented(formula.row_bindings(i, step) + _call(action, i, {}))
    if step.kind == "closure":
        closed = next(p.closed for p in domain.plans if isinstance(p, Closure) and p.action == step.action)
        return [
            *lines,
            f'have = [r["{closed.node}"] for r in tables["{closed.table}"] if r["{closed.owner}"] == s{i}_{closed.owner_param}]',
            f"order, waiting = [], [s{i}_{closed.node_param}]",
            "while waiting:",
            "    node = waiting.pop()",
            "    if node not in have:",
            "        order = [n for n in order if n != node] + [node]",
            f'        waiting += [r["{closed.target}"] for r in tables["{closed.edges}"] if r["{closed.source}"] == node]',
            "for node in reversed(order):",
            *_indented(_call(action, i, {closed.node_param: "node"})),
        ]
    if step.kind == "path":
        plan = next(p for p in domain.plans if isinstance(p, Path) and p.action == step.action)
        return [
            *lines,
            f"start = {formula.variable(i, plan.thing, plan.at)}",
            "ways = {start: (0, [])}",
            f'for turn in tables["{plan.edges}"]:',
            f'    for e in tables["{plan.edges}"]:',
            f'        if e["{plan.source}"] in ways:',
            f'            total = ways[e["{plan.source}"]][0] + e["{step.cost}"]',
            f'            if e["{plan.target}"] not in ways or total < ways[e["{plan.target}"]][0]:',
            f'                ways[e["{plan.target}"]] = (total, ways[e["{plan.source}"]][1] + [e["id"]])',
            f"for edge in ways[s{i}_goal][1]:",
            *_indented(_call(action, i, {plan.edge: "edge"})),
        ]
    return lines + _call(action, i, {})


def _call(action: Action, i: int, given: dict[str, str]) -> list[str]:
    """One write, made again where the tool says that it is busy."""
    arguments = ", ".join(f"{p.name}={given.get(p.name, f's{i}_{p.name}')}" for p in action.params)
    return [
        "for attempt in range(4):",
        f"    reply = tools.{action.name}({arguments})",
        '    if "error" not in reply or reply["error"] != "temporarily_unavailable":',
        "        break",
    ]


def verifier_source(domain: Domain, goal: Goal) -> str:
    """The verification function of a goal."""
    formula = Formula(domain, goal)
    lines = [VERIFIER_PRELUDE, "", "def verify(initial, final, answer):"]
    body = ["tables = initial", 'by = {name: {r["id"]: r for r in rows} for name, rows in tables.items()}', "new, puts = [], {}"]
    for i, step in enumerate(goal.steps):
        body += _facts(domain, formula, i, step)
    body.append(f"reasons = frame(initial, final, new, puts, {sorted(domain.derived_columns)!r})")
    for d in domain.derived:
        given = (d.table, d.column, d.child, d.ref, d.base, d.value, d.state, d.states)
        body.append(f"reasons += invariant(final, {', '.join(map(repr, given))})")
    if goal.ask:
        body += [
            f"expected = {formula.ask(goal.ask)}",
            "if not same_answer(answer, expected):",
            '    reasons.append("the answer is wrong")',
        ]
    return "\n".join([*lines, *_indented(body), "    return reasons", ""])


def _facts(domain: Domain, formula: Formula, i: int, step: Step) -> list[str]:
    action = domain.action(step.action)
    lines = formula.bindings(i, step)
    if step.kind == "each":
        assert step.each is not None
        lines.append(f"for it in {formula.rows(step.each, i)}:")
        return lines + _indented(formula.row_bindings(i, step) + _effects(domain, formula, action, i))
    if step.kind == "closure":
        closed = next(p.closed for p in domain.plans if isinstance(p, Closure) and p.action == step.action)
        have = f'[r["{closed.node}"] for r in tables["{closed.table}"] if r["{closed.owner}"] == s{i}_{closed.owner_param}]'
        edges = f'tables["{closed.edges}"], "{closed.source}", "{closed.target}"'
        lines.append(f"for s{i}_{closed.node_param} in closure({edges}, {have}, s{i}_{closed.node_param}):")
        return lines + _indented(_effects(domain, formula, action, i))
    if step.kind == "path":
        plan = next(p for p in domain.plans if isinstance(p, Path) and p.action == step.action)
        start = formula.variable(i, plan.thing, plan.at)
        edges = f'tables["{plan.edges}"], "{plan.source}", "{plan.target}", "{step.cost}"'
        lines.append(f"for s{i}_{plan.edge} in cheapest({edges}, {start}, s{i}_goal):")
        return lines + _indented(_effects(domain, formula, action, i))
    return lines + _effects(domain, formula, action, i)


def _effects(domain: Domain, formula: Formula, action: Action, i: int) -> list[str]:
    """What an action's meaning says of the final state, derived columns left out: they are checked by their definitions."""
    lines = []
    for put in action.puts:
        place = f'"{action.param(put.param).target}", s{i}_{put.param}, "{put.column}"'
        lines.append(f"puts[{place}] = {_worth(formula, action, put.value, i)}")
    for move in action.moves:
        lines.append(f'puts["{action.param(move.param).target}", s{i}_{move.param}, "{move.column}"] = {move.to!r}')
    for insert in action.inserts:
        row = ", ".join(f'"{column}": {_worth(formula, action, value, i)}' for column, value in insert.values.items())
        lines.append(f'new.append(("{insert.table}", {{{row}}}))')
    return lines


def _worth(formula: Formula, action: Action, value: object, i: int) -> str:
    if not isinstance(value, Arg):
        return repr(value)
    head, _, rest = value.path.partition(".")
    name = f"s{i}_{head}"
    if not rest:
        return name
    table = action.param(head).target
    return formula.path(table, f'by["{table}"][{name}]', rest)
