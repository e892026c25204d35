"""Errors that speak to the user: what is wrong, in which file or field, and what to do."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """A failure the user can mend. The command line prints it in one line and exits with 1."""


class UsageError(UserError):
    """A command used wrongly. The command line prints it in one line and exits with 2."""


class FieldErrors(ValueError):
    """Fields of a config out of range: field name -> what was expected and what was found."""

    def __init__(self, problems: dict[str, str]):
        self.problems = problems
        super().__init__("; ".join(f"{name}: {text}" for name, text in problems.items()))


def require(owner: Any, **claims: tuple[bool, str]) -> None:
    """Check claims about the fields of a config, in its `__post_init__`: `require(self, topk=(self.topk >= 1, "at least 1"))`.

    Raises FieldErrors that names every field whose claim is false, so that a user mends them all at once.
    """
    problems = {
        name: f"expected {expected}, found {getattr(owner, name)!r}" for name, (holds, expected) in claims.items() if not holds
    }
    if problems:
        raise FieldErrors(problems)
