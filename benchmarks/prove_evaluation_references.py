"""Every GSM8K and HumanEval reference solution scores 1, every corrupted one 0; so do the decidable IMO-AnswerBench answers."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from rorqual.evals import runner
from rorqual.evals.benchmark import Options
from rorqual.evals.catalogue import benchmark
from rorqual.evals.policies import PolicyOptions, open_policy
from rorqual.evals.results import table

SECONDS = 240
QUICK_SECONDS = 30
DATA = Path(__file__).parents[2] / "shared" / "data"
FILES = {"gsm8k": "gsm8k/train.jsonl", "humaneval": "humaneval", "imo_answerbench": "imo_answerbench"}


async def measure(name: str, program: str, limit: int | None, out: Path) -> dict:
    chosen, config = benchmark(name), runner.Config(concurrency=4)
    suite = chosen.load(chosen, Options(data=str(DATA / FILES[name]), limit=limit, timeout_s=60.0))
    async with open_policy(f"program:{program}", chosen, True, PolicyOptions()) as player:
        store = runner.cache(out, chosen, suite, config, player.identity)
        attempts = await runner.run(chosen, suite, player, config, store)
    found = table(chosen, suite, attempts, config)
    return {name: found[name] for name in ("tasks", "passed_attempts", "unscored_attempts", "outcomes")} | {
        "defective_rows": len(found["defective_rows"])
    }


def main(quick: bool) -> dict:
    if quick and not DATA.is_dir():
        print(f"{DATA}: the public answers are not here, so nothing was checked")
        return {"checked": 0}
    figures = {}
    for name in FILES:
        for program, wanted in (("gold", 1.0), ("corrupted", 0.0)):
            with tempfile.TemporaryDirectory() as out:
                found = asyncio.run(measure(name, program, 20 if quick else None, Path(out)))
            figures[f"{name}, {program}"] = found
            assert found["unscored_attempts"] == 0, (name, program, found)
            assert found["passed_attempts"]["value"] == wanted, (name, program, found)
    return figures
