"""Constraints admit exactly what a request allows: random walks through them parse, and nothing else gets through."""

from __future__ import annotations

import json
import random

import pytest
import torch

from rorqual.chat.markers import DSML, END_THINK
from rorqual.chat.parser import parse_tokens
from rorqual.serve.constraints import ConstraintError, Grammars
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
SIZE = TOKENIZER.vocab_size + 5  # a model may have more ids than its tokenizer
GRAMMARS = Grammars(TOKENIZER, SIZE)
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["a", "é"]}},
    "required": ["n", "kind"],
    "additionalProperties": False,
}


def walk(constraint, seed, steps=300, prefer=()):
    """Sample uniformly among what is admitted, until the end of sentence."""
    draw, tokens = random.Random(seed), []
    while len(tokens) < steps:
        allowed = constraint(tokens)
        ids = torch.arange(SIZE) if allowed is None else allowed.nonzero()[:, 0]
        assert len(ids), "nothing is admitted"
        wanted = [t for t in prefer if t in ids.tolist()]
        tokens.append(wanted[0] if wanted else int(draw.choice(ids.tolist())))
        if tokens[-1] == TOKENIZER.eos_id:
            return tokens
    return tokens


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_sampled_under_a_schema_is_valid_under_it(seed):
    space = set(TOKENIZER.encode(" \n\t\r"))
    constraint = GRAMMARS.for_schema(SCHEMA, thinking=False)
    tokens = walk(constraint, seed, prefer=[TOKENIZER.encode(c)[0] for c in "}0,"] if seed % 2 else ())
    if tokens[-1] != TOKENIZER.eos_id:
        assert set(tokens[-50:]) & space, "only white space can go on for ever"
        return
    value = json.loads(TOKENIZER.decode(tokens[:-1]))
    assert set(value) == {"n", "kind"} and 0 <= value["n"] <= 99 and value["kind"] in ("a", "é")


def test_reasoning_is_free_but_for_the_end_and_calls_and_then_the_schema_binds():
    constraint = GRAMMARS.for_schema(SCHEMA, thinking=True)
    before = constraint([])
    assert not before[TOKENIZER.eos_id] and not before[TOKENIZER.special_id(DSML)] and before[5]
    thought = TOKENIZER.encode("hm {")
    assert constraint(thought).sum() == before.sum()
    after = constraint([*thought, TOKENIZER.special_id(END_THINK)])
    assert after[TOKENIZER.encode("{")[0]] and not after[TOKENIZER.encode("x")[0]] and not after[TOKENIZER.eos_id]
    assert not after[TOKENIZER.vocab_size :].any(), "ids that the tokenizer lacks are never admitted"


@pytest.mark.parametrize("thinking", [False, True])
def test_a_forced_call_names_one_of_the_tools_and_then_lets_go(thinking):
    constraint = GRAMMARS.for_call(["look_up", "look"], thinking)
    head = [*TOKENIZER.encode("so"), TOKENIZER.special_id(END_THINK)] if thinking else []
    tokens = list(head)
    while constraint(tokens) is not None:
        tokens.append(int(constraint(tokens).nonzero()[:, 0][0]))
    marker = TOKENIZER.special_id(DSML)
    tail = [*TOKENIZER.encode("\n\n</"), marker, *TOKENIZER.encode("invoke>\n</"), marker, *TOKENIZER.encode("function_calls>")]
    message = parse_tokens([*tokens, *tail, TOKENIZER.eos_id], TOKENIZER, thinking)
    assert [c["function"]["name"] for c in message["tool_calls"]] in (["look"], ["look_up"])


def test_no_call_means_the_marker_is_never_admitted():
    constraint = GRAMMARS.without_calls()
    assert constraint([]).sum() == constraint([3, 4]).sum() == SIZE - 1
    assert not constraint([])[TOKENIZER.special_id(DSML)]


def test_a_schema_that_can_not_be_followed_is_refused_by_field():
    with pytest.raises(ConstraintError, match="response_format"):
        GRAMMARS.for_schema({"type": "nonsense"}, False)
