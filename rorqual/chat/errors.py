"""Errors of the chat format: they name the message and the field."""

from __future__ import annotations

from rorqual.errors import UserError


class ChatError(UserError):
    """Messages that the format can't express, or a tokenizer that lacks it. `where` is such as `messages[2].content`."""

    def __init__(self, where: str, problem: str):
        self.where = where
        self.problem = problem
        super().__init__(f"{where}: {problem}" if where else problem)
