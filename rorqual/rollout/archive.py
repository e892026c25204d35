"""Finished trajectories on disk, one file each: a rollout that is finished is never lost, and never played twice.

A file is an .npz: the arrays of every completion, and the rest as JSON. It is written under another name and renamed, so
what stands under its own name is whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from rorqual.errors import UserError
from rorqual.policy import Completion, KeptTokens, StopReason
from rorqual.rollout.trajectory import End, Observation, Trajectory, Turn
from rorqual.tasks.verdict import Verdict

ARRAYS = ("logprobs", "model_logprobs", "routed_experts", "policy_versions")


class Archive:
    """A directory of trajectories by task and sample."""

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)

    def save(self, trajectory: Trajectory) -> None:
        """Write one finished trajectory. Raises UserError where the disk refuses."""
        arrays: dict[str, np.ndarray] = {}
        record = _to_json(trajectory, arrays)
        path = self._path(trajectory.task_id, trajectory.sample)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                np.savez(file, record=np.array(json.dumps(record, ensure_ascii=False)), **arrays)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise UserError(f"{path}: could not be written ({error.strerror}); finished rollouts before it still stand") from None

    def load(self, task_id: str, sample: int) -> Trajectory | None:
        """A finished trajectory; None where there is none."""
        path = self._path(task_id, sample)
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        return _from_json(json.loads(str(arrays.pop("record"))), arrays)

    def __len__(self) -> int:
        return sum(1 for _ in self.directory.glob("*.npz"))

    def _path(self, task_id: str, sample: int) -> Path:
        name = "".join(letter if letter.isalnum() or letter in "-_." else f"%{ord(letter):x}" for letter in task_id)
        return self.directory / f"{name}.{sample}.npz"


def _to_json(trajectory: Trajectory, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "task_id": trajectory.task_id,
        "sample": trajectory.sample,
        "end": trajectory.end,
        "verdict": trajectory.verdict.to_json() if trajectory.verdict else None,
        "messages": list(trajectory.messages),
        "detail": trajectory.detail,
        "measures": dict(trajectory.measures),
        "turns": [_turn_to_json(number, turn, arrays) for number, turn in enumerate(trajectory.turns)],
    }


def _turn_to_json(number: int, turn: Turn, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "message": turn.message,
        "observations": [vars(observation) for observation in turn.observations],
        "context_tokens": turn.context_tokens,
        "sampled_tokens": turn.sampled_tokens,
        "is_reset": turn.is_reset,
        "seconds": turn.seconds,
        "completion": None,
    }
    done = turn.completion
    if done is None:
        return record
    arrays[f"{number}.prompt"] = np.array(done.prompt_tokens, np.int64)
    arrays[f"{number}.tokens"] = np.array(done.tokens, np.int64)
    for name in ARRAYS:
        value = getattr(done, name)
        if value is not None:
            arrays[f"{number}.{name}"] = value
    if done.kept_tokens is not None:
        arrays[f"{number}.kept"], arrays[f"{number}.offsets"] = done.kept_tokens.tokens, done.kept_tokens.offsets
    for layer, selected in enumerate(done.selected_indices or ()):
        arrays[f"{number}.selected.{layer}"] = selected
    layers = None if done.selected_indices is None else len(done.selected_indices)
    record["completion"] = {
        "stop_reason": done.stop_reason, "temperature": done.temperature, "cached_len": done.cached_len, "layers": layers,
        "statistics": dict(done.statistics),
    }  # fmt: skip
    return record


def _from_json(record: dict[str, Any], arrays: dict[str, np.ndarray]) -> Trajectory:
    turns = tuple(_turn_from_json(number, each, arrays) for number, each in enumerate(record["turns"]))
    verdict = Verdict.from_json(record["verdict"]) if record["verdict"] else None
    return Trajectory(
        record["task_id"], record["sample"], turns, End(record["end"]), verdict, tuple(record["messages"]), record["detail"],
        record["measures"],
    )  # fmt: skip


def _turn_from_json(number: int, record: dict[str, Any], arrays: dict[str, np.ndarray]) -> Turn:
    observations = tuple(Observation(**each) for each in record["observations"])
    completion = None
    if record["completion"] is not None:
        completion = _completion(number, record["completion"], arrays)
    return Turn(
        record["message"], completion, observations, record["context_tokens"], record["sampled_tokens"], record["is_reset"],
        record["seconds"],
    )  # fmt: skip


def _completion(number: int, record: dict[str, Any], arrays: dict[str, np.ndarray]) -> Completion:
    def own(name: str) -> Any:
        return arrays.get(f"{number}.{name}")

    kept = KeptTokens(own("kept"), own("offsets")) if own("kept") is not None else None
    selected = None if record["layers"] is None else tuple(own(f"selected.{layer}") for layer in range(record["layers"]))
    return Completion(
        tuple(own("prompt").tolist()), tuple(own("tokens").tolist()), own("logprobs"), StopReason(record["stop_reason"]),
        model_logprobs=own("model_logprobs"), kept_tokens=kept, routed_experts=own("routed_experts"), selected_indices=selected,
        temperature=record["temperature"], policy_versions=own("policy_versions"), cached_len=record["cached_len"],
        statistics=record["statistics"],
    )  # fmt: skip
