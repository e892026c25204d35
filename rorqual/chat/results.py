"""Tool results matched with the calls they answer, by id where ids are given and by position where they are not."""

from __future__ import annotations

from dataclasses import dataclass

from rorqual.chat.errors import ChatError
from rorqual.chat.messages import Turn


@dataclass(frozen=True)
class Place:
    """What is written where a tool message stands: the result of turn `result`, which may be another one of the block."""

    result: int
    is_first: bool
    is_last: bool


def order_results(turns: list[Turn], n_context: int = 0) -> dict[int, Place]:
    """For each tool turn, the place in its block; results are in the order of the calls, whatever order they came in.

    The first n_context turns are named context[…] in errors, the others messages[…].
    Raises ChatError for a result without a call, two results of one call, and calls left without a result.
    """
    places: dict[int, Place] = {}
    for index, turn in enumerate(turns):
        if turn.role == "tool" and index not in places:
            raise ChatError(
                _name(index, n_context), "is a tool result, but no assistant message with tool_calls stands before it"
            )
        if turn.role == "assistant" and turn.calls:
            places |= _block(turns, index, n_context)
    return places


def _name(index: int, n_context: int) -> str:
    return f"context[{index}]" if index < n_context else f"messages[{index - n_context}]"


def _block(turns: list[Turn], caller: int, n_context: int) -> dict[int, Place]:
    """The places of the results that follow one assistant turn."""
    end = caller + 1
    while end < len(turns) and turns[end].role == "tool":
        end += 1
    given = range(caller + 1, end)
    answered = _answers(turns, caller, given, n_context)
    _require_all(turns, caller, end, answered, n_context)
    ordered = [answered[k] for k in sorted(answered)]
    in_context = [index for index in given if index < n_context]
    if sorted(ordered[: len(in_context)]) != in_context:
        raise ChatError("context", "holds results of later calls than the first result in messages; give all results of a turn")
    n_calls = len(turns[caller].calls)
    return {index: Place(result, n == 0, n + 1 == n_calls) for n, (index, result) in enumerate(zip(given, ordered, strict=True))}


def _answers(turns: list[Turn], caller: int, given: range, n_context: int) -> dict[int, int]:
    """Call position -> turn of its result."""
    calls = turns[caller].calls
    position = {call.id: k for k, call in enumerate(calls) if call.id is not None}
    answered: dict[int, int] = {}
    for index in given:
        call_id = turns[index].call_id
        if call_id is not None and position:
            if call_id not in position:
                known = ", ".join(map(repr, position))
                raise ChatError(
                    f"{_name(index, n_context)}.tool_call_id", f"{call_id!r} is none of the calls it follows: {known}"
                )
            k = position[call_id]
            if k in answered:
                raise ChatError(f"{_name(index, n_context)}.tool_call_id", f"{call_id!r} has a result already")
            answered[k] = index
    free = (k for k in range(len(calls)) if k not in answered)
    for index in (index for index in given if index not in answered.values()):
        k = next(free, None)
        if k is None:
            raise ChatError(_name(index, n_context), f"is one tool result too many: {len(calls)} calls stand before it")
        answered[k] = index
    return answered


def _require_all(turns: list[Turn], caller: int, end: int, answered: dict[int, int], n_context: int) -> None:
    """All results, or none, before the conversation goes on; at its end the first ones may stand alone."""
    calls = turns[caller].calls
    missing = [k for k in range(len(calls)) if k not in answered]
    is_prefix = missing == list(range(len(answered), len(calls)))
    if not missing or not answered or (end == len(turns) and is_prefix):
        return
    names = ", ".join(repr(calls[k].id or calls[k].name) for k in missing)
    raise ChatError(
        f"{_name(caller, n_context)}.tool_calls", f"no result for {names}, though other calls of the turn have theirs"
    )
