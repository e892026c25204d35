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
FULL_MARKS = 0.999


@functools.cache
def dataset(name):
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0)


def score(request):
    """{"score": number} or {"problem": text}. request: dataset, entry (question, answer, metadata), answer.

    An answer that the library's scorer raises on is wrong where it reads the entry's own answer; else the scorer is at fault.
    """
    if request["dataset"] in READS_CODE:
        return {"problem": f"the scorer of {request['dataset']} reads answers as code"}
    try:
        return {"score": marks(request, request["answer"])}
    except Exception as error:
        problem = {"problem": f"{type(error).__name__}: {error}"[:300]}
    try:
        return {"score": 0.0} if marks(request, request["entry"]["answer"]) >= FULL_MARKS else problem
    except Exception:
        return problem


def marks(request, answer):
    return float(dataset(request["dataset"]).score_answer(answer, request["entry"]))


def main():
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(score(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
