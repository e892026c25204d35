"""The scorers of the reasoning-gym library, as a program that reads requests line by line; it runs confined.

Data sets whose scorer reads an answer as code are refused: such an answer could say what its own score is.
"""

from __future__ import annotations

import functools
import json
import sys

READS_CODE = (
    "binary_matrix", "codeio", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24",
    "simple_integration", "spiral_matrix", "string_insertion",
)  # fmt: skip


@functools.cache
def dataset(name):
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0)


def score(request):
    """{"score": number} or {"problem": text}. request: dataset, entry (question, answer, metadata), answer."""
    if request["dataset"] in READS_CODE:
        return {"problem": f"the scorer of {request['dataset']} reads answers as code"}
    try:
        return {"score": float(dataset(request["dataset"]).score_answer(request["answer"], request["entry"]))}
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}"[:300]}


def main():
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(score(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
