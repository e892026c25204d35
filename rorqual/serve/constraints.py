"""What a request lets the model write, as the engine's constraint: the allowed tokens after those sampled so far.

Built on llguidance. A grammar binds the answer, not the reasoning: in thinking mode it begins after </think>, and until then
only the end of the message is kept out. `tool_choice` forces the head of a call block and then lets go; `none` keeps the
call marker out of the whole message.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rorqual.chat import Tokenizer
from rorqual.chat.markers import DSML, END_THINK
from rorqual.errors import UserError


class ConstraintError(UserError):
    """A schema or a tool choice that can't be carried out: names the field."""


class Grammars:
    """Makes constraints for one tokenizer. vocab_size: of the model, which may have more ids than the tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size

    @cached_property
    def engine(self) -> Any:
        """llguidance's view of the vocabulary: bytes of every id; special tokens are no text."""
        import llguidance

        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(self.tokenizer)), n_vocab=self.vocab_size)

    def for_schema(self, schema: dict[str, Any] | None, thinking: bool) -> Constraint:
        """JSON of a schema (None: any JSON object). Raises ConstraintError for a schema that llguidance can't follow."""
        body = json.dumps(schema if schema is not None else {"type": "object"}, ensure_ascii=False)
        return self._constraint(f"start: %json {body}\n", thinking, releases=False, field="response_format")

    def for_call(self, names: Sequence[str], thinking: bool) -> Constraint:
        """A call of one of the named tools; its arguments are free."""
        marker = f"<[{self.tokenizer.special_id(DSML)}]>"
        choice = " | ".join(json.dumps(name + '">', ensure_ascii=False) for name in names)
        head = f'"\\n\\n<" {marker} "function_calls>\\n<" {marker} "invoke name=\\"" ({choice})'
        return self._constraint(f"start: {head}\n", thinking, releases=True, field="tool_choice")

    def without_calls(self) -> Constraint:
        """Anything but a call."""
        allowed = torch.ones(self.vocab_size, dtype=torch.bool)
        allowed[self.tokenizer.special_id(DSML)] = False
        return Constraint(None, allowed, False, -1)

    def _constraint(self, grammar: str, thinking: bool, releases: bool, field: str) -> Constraint:
        import llguidance

        matcher = llguidance.LLMatcher(self.engine, grammar, log_level=0)
        if matcher.is_error():
            raise ConstraintError(f"{field}: {matcher.get_error().strip().splitlines()[0]}")
        before = torch.ones(self.vocab_size, dtype=torch.bool)
        for token in (self.tokenizer.eos_id, self.tokenizer.special_id(DSML)):
            before[token] = False
        return Constraint(matcher, before, releases, self.tokenizer.special_id(END_THINK) if thinking else -1)


class Constraint:
    """`constraint(sampled)` gives the tokens admitted next, bool [V], or None for all. Belongs to one request.

    before: what is admitted until the grammar begins (or always, without one). releases: everything is admitted once the
    grammar is through; else only the end of the message.
    """

    def __init__(self, matcher: Any, before: Tensor, releases: bool, begins_after: int):
        self._matcher, self._before, self._releases = matcher, before, releases
        self._waits_for = begins_after
        self._seen = 0
        self._is_through = False

    def __call__(self, sampled: Sequence[int]) -> Tensor | None:
        for token in sampled[self._seen :]:
            self._take(token)
        self._seen = len(sampled)
        if self._matcher is None or self._waits_for >= 0:
            return self._before
        return None if self._is_through else self._mask()

    def _take(self, token: int) -> None:
        if self._waits_for >= 0:
            if token == self._waits_for:
                self._waits_for = -1
        elif self._matcher is not None and not self._is_through:
            self._matcher.consume_token(token)
            self._is_through = self._releases and self._matcher.is_accepting()

    def _mask(self) -> Tensor:
        import llguidance.numpy as masks

        size = len(self._before)
        bits = masks.allocate_token_bitmask(1, size)
        masks.fill_next_token_bitmask(self._matcher, bits, 0)
        words = torch.from_numpy(bits[0].astype("int64"))
        return (words[:, None] >> torch.arange(32) & 1).bool().flatten()[:size]


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.special_tokens)
        special = tokenizer.special_tokens
        self.tokens = [special[i].encode() if i in special else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)
