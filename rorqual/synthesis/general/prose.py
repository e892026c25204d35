"""A goal in words: a typed realiser with several registers. Procedural prose, plain and exact; an endpoint may paraphrase it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from rorqual.synthesis.general.calculus import Arg, Atom, Clause
from rorqual.synthesis.general.domain import Domain
from rorqual.synthesis.general.goals import Ask, Const, Diff, Goal, Pick, Selector, Step
from rorqual.synthesis.general.surface import plural, words

REGISTERS = ("terse", "plain", "formal", "chatty")
COMPARE = {
    "terse": {"==": "= {}", "!=": "not {}", "<=": "<= {}", ">=": ">= {}", "<": "< {}", ">": "> {}", "in": "in {}"},
    "plain": {"==": "is {}", "!=": "is not {}", "<=": "is at most {}", ">=": "is at least {}", "<": "is below {}",
              ">": "is above {}",
              "in": "is one of {}"},
    "formal": {"==": "equals {}", "!=": "differs from {}", "<=": "does not exceed {}", ">=": "is no less than {}",
               "<": "is less than {}", ">": "is greater than {}", "in": "is among {}"},
    "chatty": {"==": "is {}", "!=": "isn't {}", "<=": "is {} or less", ">=": "is {} or more", "<": "is under {}",
               ">": "is over {}",
               "in": "is one of {}"},
}  # fmt: skip
DATES = {"<=": "is on or before {}", ">=": "is on or after {}", "<": "is before {}", ">": "is after {}"}
OPENINGS = {
    "terse": ("", "To do: ", "Task: "),
    "plain": ("Please do the following. ", "Here is what is needed. ", ""),
    "formal": ("You are requested to carry out the following. ", "Kindly see to this matter. ", "The following is to be done. "),
    "chatty": ("Hi! ", "Could you help me out? ", "Quick one for you. "),
}
CLOSINGS = {
    "terse": "Change nothing else.",
    "plain": "Do not change anything else.",
    "formal": "No other record is to be altered.",
    "chatty": "And please leave everything else alone.",
}
REPORT = {
    "terse": "Report {}.",
    "plain": "Then tell me {}.",
    "formal": "State {}.",
    "chatty": "Oh, and let me know {}?",
}


@dataclass(frozen=True)
class Realiser:
    """Renders goals over one world in one register."""

    domain: Domain
    register: str

    def prompt(self, goal: Goal, rng: random.Random, has_submit: bool = True) -> str:
        if self.domain.plan.is_compact:
            return self._compact(goal)
        sentences = [self.step(i, step, goal) for i, step in enumerate(goal.steps)]
        text = rng.choice(OPENINGS[self.register]) + " ".join(sentences)
        if goal.ask:
            asked = REPORT[self.register] if goal.steps else "{}."
            question = self.ask(goal.ask)
            text += (" " if goal.steps else "") + asked.format(question if goal.steps else f"Find {question}")
        if goal.steps:
            text += " " + CLOSINGS[self.register]
        if goal.ask and has_submit:
            text += " Hand in the bare value with submit."
        return text.strip()

    def _compact(self, goal: Goal) -> str:
        sentences = [self.step(i, step, goal) for i, step in enumerate(goal.steps)]
        if goal.ask:
            sentences.append(f"Find {self.ask(goal.ask)}. Answer with the bare value.")
        return " ".join(sentences)

    def step(self, i: int, step: Step, goal: Goal) -> str:
        action = self.domain.action(step.action)
        said = {name: self.argument(i, step, name) for name in step.args}
        text = action.phrase
        if step.kind == "each":
            assert step.each is not None
            said[step.target] = f"every {self.noun(step.each.table)} {self.such_that(step.each)}".rstrip()
        if step.kind == "path":
            return self._path(step, said)
        for name, value in said.items():
            text = text.replace("{" + name + "}", value)
        if step.kind == "closure":
            text += ", and before it everything that it requires and that is still missing"
        return _sentence(text if i == 0 else f"{'after that' if self.register == 'formal' else 'then'} {text}")

    def _path(self, step: Step, said: dict[str, str]) -> str:
        thing = next(value for name, value in said.items() if name != "goal")
        verb = {"terse": "move", "plain": "bring", "formal": "convey", "chatty": "get"}[self.register]
        return _sentence(f"{verb} {thing} to {said['goal']}, leg by leg, on the way whose total {words(step.cost)} is smallest")

    def argument(self, i: int, step: Step, name: str) -> str:
        value = step.args[name]
        if isinstance(value, Const):
            return str(value.value)
        if isinstance(value, Diff):
            return f"the difference ({words(value.column)} minus {words(value.minus)})"
        assert isinstance(value, Pick)
        return self.row(value.selector)

    def noun(self, table: str) -> str:
        return words(table)

    def row(self, selector: Selector) -> str:
        """A noun phrase for the one row that comes first."""
        named = next((a for a in selector.atoms if a.path == "name" and a.op == "==" and a.is_constant), None)
        if named is not None and not selector.order:
            return f"{self.noun(selector.table)} {named.value}" if self.register != "terse" else str(named.value)
        text = f"the {self.noun(selector.table)} {self.such_that(selector)}".rstrip()
        if not selector.order:
            return text
        rank = "largest" if selector.is_max else "smallest"
        if self.domain.follow(selector.table, selector.order)[1].kind == "date":  # type: ignore[union-attr]
            rank = "latest" if selector.is_max else "earliest"
        text = f"the {self.noun(selector.table)} with the {rank} {self.column(selector.order)}"
        constraints = self.such_that(selector)
        text += f" (among those {constraints})" if constraints else ""
        return text + (f", ties broken by the smallest {self.column(selector.tie)}" if selector.tie else "")

    def such_that(self, selector: Selector) -> str:
        parts = [self.atom(selector.table, atom) for atom in selector.atoms]
        return f"whose {' and whose '.join(parts)}" if parts else ""

    def column(self, path: str) -> str:
        *hops, last = path.split(".")
        return " of the ".join([words(last), *(words(hop) for hop in reversed(hops))])

    def atom(self, table: str, atom: Atom) -> str:
        left = self.column(atom.path) + (f" minus {self.column(atom.minus)}" if atom.minus else "")
        column = self.domain.follow(table, atom.path)[1]
        is_date = column is not None and column.kind == "date" and atom.op in DATES
        template = DATES[atom.op] if is_date else COMPARE[self.register][atom.op]
        return f"{left} {template.format(self.value(atom))}"

    def value(self, atom: Atom) -> str:
        if isinstance(atom.value, Arg):
            head, _, rest = atom.value.path.partition(".")
            if head == "self":
                return f"its {self.column(rest)}"
            if head.startswith("step"):
                return (
                    f"that of the {words(rest.partition('.')[2] or rest)} just chosen" if "." in rest else "the one just chosen"
                )
            return f"the {self.column(rest)} of that {words(head)}" if rest else f"that {words(head)}"
        if isinstance(atom.value, (tuple, list)):
            return " or ".join(map(str, atom.value))
        return str(atom.value)

    def ask(self, ask: Ask) -> str:
        if ask.kind == "value":
            return f"the {self.column(ask.column)} of {self.row(ask.selector)}"
        many = f"the {words(plural(ask.selector.table))} {self.such_that(ask.selector)}".rstrip()
        if ask.kind == "count":
            return f"the number of {many.removeprefix('the ')}"
        name = {"sum": "sum of", "max": "largest", "min": "smallest"}[ask.kind]
        return f"the {name} {self.column(ask.column)} over {many}"

    def clause(self, clause: Clause) -> str:
        """A policy in one sentence."""
        head, _, rest = clause.atom.path.partition(".")
        table = self.domain.action(clause.action).param(head).target
        said = self.atom(table, Atom(rest, clause.atom.op, clause.atom.value))
        return f"Use {clause.action} only for a {words(head)} whose {said}."


def system_message(domain: Domain, goal: Goal, extra: tuple[str, ...] = ()) -> str:
    """Where the agent is, and the policies in force."""
    realiser = Realiser(domain, "plain")
    text = f"You work with {'; '.join(domain.themes)}. Use the tools; the records can be reached in no other way."
    rules = [realiser.clause(domain.clauses[i]) for i in goal.clauses] + list(extra)
    if rules:
        text += "\nPolicies:\n" + "\n".join(f"- {rule}" for rule in rules)
    return text


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
