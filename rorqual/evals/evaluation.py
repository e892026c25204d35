"""One evaluation, from what is asked for to OUT/results.json: what `rorqual evaluate` and a recipe's evaluation both run."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rorqual.errors import UsageError, UserError, require
from rorqual.evals import runner
from rorqual.evals.benchmark import Benchmark, Options, Suite
from rorqual.evals.catalogue import benchmark
from rorqual.evals.judging import TEMPLATE, Judge, read_template
from rorqual.evals.policies import PROGRAM, PolicyOptions, open_policy
from rorqual.evals.published import published_costs, published_curves, published_scores
from rorqual.evals.results import Prices, curve, table
from rorqual.evals.results import chosen as counted
from rorqual.evals.runner import Config
from rorqual.rollout.trajectory import Trajectory
from rorqual.runlog import RunLog, write_atomically
from rorqual.tasks.task import digest
from rorqual.workers import Workers, open_stage

RESULTS, ASKED = "results.json", "evaluation.json"
Attempts = Mapping[str, Sequence[Trajectory]]


@dataclass(frozen=True)
class JudgeOptions:
    """Who decides answers in place of equality."""

    policy: str
    """A checkpoint directory or an http(s) address."""
    model: str = ""
    template: Path | None = None
    """None: our own."""
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        require(self, max_tokens=(self.max_tokens >= 1, "at least 1"))


@dataclass(frozen=True)
class Evaluation:
    """What is measured, how, and where its attempts are kept."""

    benchmark: str
    policy: str
    """A checkpoint directory, an http(s) address, or program:NAME."""
    out: Path
    config: Config = field(default_factory=Config)
    options: Options = field(default_factory=Options)
    player: PolicyOptions = field(default_factory=PolicyOptions)
    judge: JudgeOptions | None = None
    ks: tuple[int, ...] = (1,)
    prices: Prices = field(default_factory=Prices)
    workers: Workers = field(default_factory=Workers)
    """Where environments are played: here, or on a Ray cluster."""
    rescore: bool = False
    """Judge the attempts of `out` anew, without the policy."""
    share: tuple[int, int] = (1, 1)
    """(i, n): of every n tasks the i-th alone, for n processes side by side, each with an `out` of its own."""

    def __post_init__(self) -> None:
        index, count = self.share
        require(
            self,
            ks=(bool(self.ks) and min(self.ks) >= 1 and max(self.ks) <= self.config.samples, "from 1 to config.samples"),
            share=(1 <= index <= count, "(i, n) with i from 1 to n"),
        )


def evaluate(asked: Evaluation, quiet: bool = False) -> dict[str, Any]:
    """Play what is not there yet, and write and return the results: a pure function of the attempts on disk.

    Raises UserError where the benchmark, the policy or the judge can't be had, or another judge decided what `out` holds.
    """
    return asyncio.run(_evaluate(asked, quiet))


async def _evaluate(asked: Evaluation, quiet: bool) -> dict[str, Any]:
    # Worlds, scorers and judges wait in threads: one for each attempt under way, whatever the machine's processor count.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(asked.config.concurrency + 4))
    chosen = benchmark(asked.benchmark)
    async with AsyncExitStack() as opened:
        judge = await _judge(asked, chosen, opened) if asked.judge else None
        stage = opened.enter_context(open_stage(asked.workers))
        options = replace(asked.options, judge=judge)
        suite = _share_of(chosen.load(chosen, options), asked)
        suite = replace(suite, open_episode=stage.remote(suite.open_episode))
        log = RunLog(asked.out, quiet=quiet)
        log.begin(asked.config)
        identity, attempts = await (_rescored if asked.rescore else _played)(asked, chosen, suite, judge, log)
        results = _results(asked, chosen, suite, options, identity, attempts)
    write_atomically(asked.out / RESULTS, json.dumps(results, indent=1))
    log.event("evaluated", benchmark=chosen.name, context=asked.config.context, score=results["score"]["value"])
    log.close()
    return results


def _share_of(suite: Suite, asked: Evaluation) -> Suite:
    index, count = asked.share
    tasks = dict(islice(suite.tasks.items(), index - 1, None, count))
    if not tasks:
        raise UserError(f"share {index} of {count}: no task is left for it; there are {len(suite.tasks)}")
    return replace(suite, tasks=tasks)


async def _judge(asked: Evaluation, chosen: Benchmark, opened: AsyncExitStack) -> Judge:
    options = asked.judge
    assert options is not None
    if options.policy.startswith(PROGRAM):
        raise UsageError(f"--judge {options.policy}: a judge is a checkpoint directory or an http(s) address")
    template = read_template(str(options.template)) if options.template else TEMPLATE
    how = replace(asked.player, model=options.model)
    player = await opened.enter_async_context(open_policy(options.policy, chosen, False, how))
    identity = f"{player.identity}/{digest(template, 8)}"
    return Judge(identity, player.summariser, asyncio.get_running_loop(), template, options.max_tokens)


async def _rescored(asked: Evaluation, chosen: Benchmark, suite: Suite, judge: Judge | None, log: RunLog) -> tuple[str, Attempts]:
    identity = _stored(asked.out)["identity"]
    store = runner.cache(asked.out, chosen, suite, asked.config, identity)
    return identity, await runner.rescore(suite, runner.stored(suite, asked.config, store), asked.config.concurrency)


async def _played(asked: Evaluation, chosen: Benchmark, suite: Suite, judge: Judge | None, log: RunLog) -> tuple[str, Attempts]:
    config = asked.config
    async with open_policy(asked.policy, chosen, config.thinks(chosen), asked.player) as player:
        _claim(asked, player.identity, judge)
        store = runner.cache(asked.out, chosen, suite, config, player.identity)
        with log.progress(f"{chosen.name} {config.context}", len(suite.tasks) * config.attempts) as bar:
            return player.identity, await runner.run(chosen, suite, player, config, store, lambda trajectory: bar.advance())


def _claim(asked: Evaluation, identity: str, judge: Judge | None) -> None:
    """Say before the first attempt whose these are. Raises UserError where attempts that another judge decided stand there."""
    now = judge.identity if judge else None
    before = _stored(asked.out).get("judge") if (asked.out / ASKED).exists() else now
    if before != now:
        raise UserError(
            f"{asked.out}: its attempts were decided by {before or 'equality'}, not by {now or 'equality'}; "
            "--rescore judges them anew, or give another --out"
        )
    told = {"identity": identity, "judge": now, "config": dataclasses.asdict(asked.config)}
    write_atomically(asked.out / ASKED, json.dumps(told, indent=1))


def _stored(out: Path) -> dict[str, Any]:
    path = out / ASKED
    if not path.exists():
        raise UsageError(f"{path}: no such file; --rescore judges the attempts of an evaluation that was made in --out")
    return json.loads(path.read_text(encoding="utf-8"))


def _results(
    asked: Evaluation, chosen: Benchmark, suite: Suite, options: Options, identity: str, attempts: Attempts
) -> dict[str, Any]:
    judge = options.judge
    results = {
        "policy": asked.policy, "identity": identity, "rescored": asked.rescore, "source": chosen.source,
        "licence": chosen.licence, "judge": judge.identity if judge else None, "share": list(asked.share),
        "protocol": _protocol(chosen, asked.config),
    }  # fmt: skip
    results |= table(chosen, suite, attempts, asked.config, asked.ks, asked.prices)
    results |= {
        "curve": curve(attempts, asked.config), "published": published_scores(chosen.published),
        "published_costs": published_costs(chosen.published), "published_curves": published_curves(chosen.published),
    }  # fmt: skip
    results["extra"] = chosen.extra(suite, counted(attempts, asked.config), options) if chosen.extra else None
    return results


def _protocol(chosen: Benchmark, config: Config) -> dict[str, Any]:
    """What was really asked, the protocol's own values and what was put in their place."""
    agent, params = config.agent(chosen), config.params(chosen)
    return {
        "template": chosen.protocol.template, "temperature": params.temperature, "top_p": params.top_p,
        "thinking": config.thinks(chosen), "max_turns": agent.max_turns, "max_tokens": agent.max_tokens, "window": agent.window,
        "trigger_share": agent.trigger_share, "notes": chosen.notes,
    }  # fmt: skip


def read_results(directory: Path) -> dict[str, Any]:
    """Of an evaluation that ended. Raises UsageError where there is none."""
    path = directory / RESULTS
    if not path.exists():
        raise UsageError(f"{path}: no such file; an evaluation that ended has one")
    return json.loads(path.read_text(encoding="utf-8"))
