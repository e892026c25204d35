"""Measure a policy on a benchmark under one of the paper's context strategies, with honest statistics.

    rorqual evaluate --benchmark gsm8k --policy runs/tiny/model --data gsm8k/test.jsonl --limit 100 --out runs/gsm8k
    rorqual evaluate --benchmark heldout --data tasks --policy http://127.0.0.1:8000 --context discard-all --n 4 --k 4 --out run
    rorqual evaluate --benchmark gsm8k --data test.jsonl --policy program:gold --out runs/gold --compare runs/gsm8k
    rorqual evaluate --benchmark hle --policy http://127.0.0.1:8000 --judge http://127.0.0.1:9000 --out runs/hle

A run that was stopped goes on where it was when the same command is given again. --rescore judges the attempts of --out anew
without running the policy. A policy is a checkpoint directory, an OpenAI-compatible address (key in OPENAI_API_KEY) or a program
(program:gold, :corrupted, :silent, :endless, :failing). --benchmark list prints the benchmarks, with licence and source.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

from rorqual.errors import FieldErrors, UsageError, UserError

CONTEXTS = ("none", "summary", "discard-75", "discard-all", "parallel-fewest-step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--benchmark", required=True, help="its name, or list")
    add("--policy", help="a checkpoint directory, an http(s) address, or program:NAME")
    add("--context", choices=CONTEXTS, default="none", help="what is done when a trajectory outgrows its window")
    add("--runs", type=int, default=4, help="N of parallel-fewest-step")
    add("--data", help="local file or directory of the benchmark (else the Hugging Face hub)")
    add("--split", default="test", help="of a store of tasks: test, test_combination, test_mechanism, train, all")
    add("--user", default="", metavar="URL", help="the endpoint that plays the user, where a benchmark has one (tau2_retail)")
    add("--user-model", default="", help="the user's name at that endpoint")
    add("--limit", type=int, help="only the first so many tasks")
    add("--n", type=int, default=1, help="attempts at each task that count")
    add("--k", type=int, nargs="+", default=[1], help="pass@k for each of these")
    add("--out", help="where attempts and results are kept")
    add("--seed", type=int, default=0, help="of sampling, and of generated sets")
    add("--count", type=int, default=100, help="tasks of a generated set")
    add("--length", type=int, default=4096, help="characters of a generated set's texts")
    add("--temperature", type=float, help="instead of the protocol's")
    add("--top-p", type=float, help="instead of the protocol's")
    add("--thinking", choices=("on", "off"), help="instead of the protocol's")
    add("--max-tokens", type=int, help="sampled tokens of one attempt, resets included")
    add("--max-turn-tokens", type=int, help="sampled tokens of one message")
    add("--max-turns", type=int, help="steps of one attempt, resets included")
    add("--window", type=int, help="the context's length in tokens")
    add("--trigger-share", type=float, default=0.8, help="share of the window above which a strategy acts")
    add("--concurrency", type=int, default=16, help="attempts at one time")
    add("--workers", default="1", help="ray or ray:N: environments are played on the workers of a Ray cluster; 1: here")
    add("--judge", metavar="POLICY", help="a checkpoint or address that decides answers instead of equality (hle, browse, maths)")
    add("--judge-model", default="", help="the judge's name at its endpoint")
    add("--judge-max-tokens", type=int, default=4096, help="sampled tokens of one verdict")
    add("--judge-template", metavar="FILE", help="instead of our own; with {question}, {gold} and {response}")
    add("--rule", choices=("ioi", "icpc"), default="ioi", help="how a contest counts its submissions")
    add("--submissions", type=int, default=50, help="of a contest, at most so many for each problem, the longest thinking first")
    add("--isolation", default="bwrap", help="how programs are confined: bwrap, process or oci")
    add("--program-timeout", type=float, default=10.0, metavar="S", help="wall-clock seconds of one run of a program")
    add("--model", default="", help="the model's name at an endpoint")
    add("--max-tries", type=int, default=4, help="how often an endpoint is asked before the attempt counts as failed")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds without an answer after which an endpoint has stalled")
    add("--plain-endpoint", action="store_true", help="send no chat_template_kwargs to the endpoint")
    add("--dtype", default="float32")
    add("--device", default="cpu")
    add("--cache-tokens", type=int, default=65536, help="room of the embedded engine's cache")
    add("--price", type=float, nargs=2, default=(0.0, 0.0), metavar=("IN", "OUT"), help="of a million tokens")
    add("--retry-failures", action="store_true", help="play attempts anew whose policy or world failed")
    add("--rescore", action="store_true", help="judge the stored attempts anew, without the policy")
    add("--compare", metavar="RUN", help="compare with another evaluation's directory, task by task")
    add("--page", action="store_true", help="write OUT/index.html, with the strategies of --beside in one plot")
    add("--beside", nargs="*", default=[], metavar="RUN", help="other evaluations to put on the page")
    add("--quiet", action="store_true", help="no progress on the console")
    add("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int | None:
    from rorqual.evals.catalogue import benchmark

    if args.benchmark == "list":
        return _list(args.json)
    chosen = benchmark(args.benchmark)
    if args.policy is None or args.out is None:
        raise UsageError("--policy and --out are needed: what is measured, and where the attempts are kept")
    if max(args.k) > args.n or min(args.k) < 1:
        raise UsageError(f"--k {max(args.k)}: pass@k needs at least k attempts at each task, found --n {args.n}")
    if args.judge and not chosen.is_judged:
        raise UsageError(f"--judge: {chosen.name} is decided by its own scorer; a judge is for hle, browse and mathematics")
    _check(args, chosen)
    results = asyncio.run(_evaluate(args, chosen))
    if args.compare:
        results["comparison"] = _compare(Path(args.compare), results)
    if args.page:
        _write_page(args)
    print(json.dumps(results) if args.json else f"{_text(results)}\nkept in            {args.out}{_page(args)}")


def _check(args: argparse.Namespace, chosen: Any) -> None:
    """Raises UsageError that names every flag out of range, before anything is made."""
    from rorqual.rollout.endpoint import EndpointConfig

    parts = (
        (lambda: _config(args), {"samples": "n"}),
        (lambda: _config(args).agent(chosen), {}),
        (lambda: _config(args).params(chosen), {}),
        (lambda: _options(args), {"timeout_s": "program-timeout"}),
        (lambda: EndpointConfig("http://x", timeout_s=args.timeout, max_tries=args.max_tries), {"timeout_s": "timeout"}),
    )
    problems: dict[str, str] = {}
    if args.judge_max_tokens < 1:
        problems["judge-max-tokens"] = f"expected at least 1, found {args.judge_max_tokens}"
    for made, flags in parts:
        try:
            made()
        except FieldErrors as error:
            problems |= {flags.get(name, name.replace("_", "-")): text for name, text in error.problems.items()}
    if problems:
        raise UsageError("; ".join(f"--{flag}: {text}" for flag, text in problems.items()))


async def _evaluate(args: argparse.Namespace, chosen: Any) -> dict[str, Any]:
    from concurrent.futures import ThreadPoolExecutor
    from contextlib import AsyncExitStack

    # Worlds, scorers and judges wait in threads: one for each attempt under way, whatever the machine's processor count.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max(args.concurrency, 0) + 4))
    async with AsyncExitStack() as opened:
        judge = await _judge(args, chosen, opened) if args.judge else None
        return await _measured(args, chosen, judge, opened.enter_context(_stage(args)))


def _stage(args: argparse.Namespace) -> Any:
    """Where environments are opened."""
    from rorqual.workers import Workers, open_stage

    workers = Workers.parse(args.workers)
    if workers.engine == "local" and workers.count > 1:
        raise UsageError(f"--workers {args.workers}: on one machine --concurrency says how many attempts go on at a time")
    return open_stage(workers)


async def _judge(args: argparse.Namespace, chosen: Any, opened: Any) -> Any:
    from rorqual.evals.judging import TEMPLATE, Judge, read_template
    from rorqual.evals.policies import PROGRAM, open_policy
    from rorqual.tasks.task import digest

    if args.judge.startswith(PROGRAM):
        raise UsageError(f"--judge {args.judge}: a judge is a checkpoint directory or an http(s) address")
    template = read_template(args.judge_template) if args.judge_template else TEMPLATE
    how = dataclasses.replace(_policy_options(args), model=args.judge_model)
    player = await opened.enter_async_context(open_policy(args.judge, chosen, False, how))
    return Judge(
        f"{player.identity}/{digest(template, 8)}", player.summariser, asyncio.get_running_loop(), template, args.judge_max_tokens
    )


async def _measured(args: argparse.Namespace, chosen: Any, judge: Any, stage: Any) -> dict[str, Any]:
    from rorqual.evals.published import published_costs, published_curves, published_scores
    from rorqual.evals.results import Prices, curve, table
    from rorqual.evals.results import chosen as counted
    from rorqual.runlog import RunLog, write_atomically

    config, options = _config(args), dataclasses.replace(_options(args), judge=judge)
    suite = chosen.load(chosen, options)
    suite = dataclasses.replace(suite, open_episode=stage.remote(suite.open_episode))
    log = RunLog(args.out, quiet=args.quiet or args.json)
    log.begin(config)
    identity, attempts = await (_rescored if args.rescore else _played)(args, chosen, suite, config, judge, log)
    results = {"policy": args.policy, "identity": identity, "rescored": args.rescore, "source": chosen.source,
               "licence": chosen.licence, "judge": judge.identity if judge else None,
               "protocol": _protocol(chosen, config)}  # fmt: skip
    results |= table(chosen, suite, attempts, config, args.k, Prices(*args.price))
    results |= {"curve": curve(attempts, config), "published": published_scores(chosen.published),
                "published_costs": published_costs(chosen.published),
                "published_curves": published_curves(chosen.published)}  # fmt: skip
    results["extra"] = chosen.extra(suite, counted(attempts, config), options) if chosen.extra else None
    write_atomically(Path(args.out) / "results.json", json.dumps(results, indent=1))
    log.event("evaluated", benchmark=chosen.name, context=config.context, score=results["score"]["value"])
    log.close()
    return results


async def _rescored(args: argparse.Namespace, chosen: Any, suite: Any, config: Any, judge: Any, log: Any) -> tuple[str, Any]:
    from rorqual.evals import runner

    identity = _stored(Path(args.out))["identity"]
    store = runner.cache(Path(args.out), chosen, suite, config, identity)
    return identity, await runner.rescore(suite, runner.stored(suite, config, store), args.concurrency)


async def _played(args: argparse.Namespace, chosen: Any, suite: Any, config: Any, judge: Any, log: Any) -> tuple[str, Any]:
    from rorqual.evals import runner
    from rorqual.evals.policies import open_policy

    out = Path(args.out)
    async with open_policy(args.policy, chosen, config.thinks(chosen), _policy_options(args)) as player:
        _claim(out, player.identity, judge, config)
        store = runner.cache(out, chosen, suite, config, player.identity)
        with log.progress(f"{chosen.name} {config.context}", len(suite.tasks) * config.attempts) as bar:
            return player.identity, await runner.run(chosen, suite, player, config, store, lambda trajectory: bar.advance())


def _claim(out: Path, identity: str, judge: Any, config: Any) -> None:
    """Say before the first attempt whose these are. Raises UserError where attempts that another judge decided stand there."""
    from rorqual.runlog import write_atomically

    now = judge.identity if judge else None
    before = _stored(out).get("judge") if (out / "evaluation.json").exists() else now
    if before != now:
        raise UserError(
            f"{out}: its attempts were decided by {before or 'equality'}, not by {now or 'equality'}; "
            "--rescore judges them anew, or give another --out"
        )
    told = {"identity": identity, "judge": now, "config": dataclasses.asdict(config)}
    write_atomically(out / "evaluation.json", json.dumps(told, indent=1))


def _policy_options(args: argparse.Namespace) -> Any:
    from rorqual.evals.policies import PolicyOptions

    return PolicyOptions(
        args.model, args.dtype, args.device, args.cache_tokens, args.max_tries, args.timeout, args.concurrency,
        says_thinking=not args.plain_endpoint,
    )  # fmt: skip


def _config(args: argparse.Namespace) -> Any:
    from rorqual.evals.runner import Config

    thinking = None if args.thinking is None else args.thinking == "on"
    names = ("context", "runs", "seed", "concurrency", "temperature", "top_p", "max_tokens", "max_turn_tokens", "max_turns",
             "window", "trigger_share", "retry_failures")  # fmt: skip
    return Config(samples=args.n, thinking=thinking, **{name: getattr(args, name) for name in names})


def _options(args: argparse.Namespace) -> Any:
    from rorqual.evals.benchmark import Options

    names = ("data", "limit", "seed", "count", "length", "isolation", "split", "user", "user_model", "rule", "submissions")
    return Options(timeout_s=args.program_timeout, **{name: getattr(args, name) for name in names})


def _protocol(chosen: Any, config: Any) -> dict[str, Any]:
    """What was really asked, the protocol's own values and what was put in their place."""
    agent, params = config.agent(chosen), config.params(chosen)
    return {
        "template": chosen.protocol.template, "temperature": params.temperature, "top_p": params.top_p,
        "thinking": config.thinks(chosen), "max_turns": agent.max_turns, "max_tokens": agent.max_tokens, "window": agent.window,
        "trigger_share": agent.trigger_share, "notes": chosen.notes,
    }  # fmt: skip


def _stored(out: Path) -> dict[str, Any]:
    path = out / "evaluation.json"
    if not path.exists():
        raise UsageError(f"{path}: no such file; --rescore judges the attempts of an evaluation that was made in --out")
    return json.loads(path.read_text(encoding="utf-8"))


def _compare(other: Path, results: dict[str, Any]) -> dict[str, Any]:
    from rorqual.evals.results import paired

    first = read_results(other)
    return {"first": str(other), "first_policy": first["policy"], **paired(first, results)}


def read_results(directory: Path) -> dict[str, Any]:
    path = directory / "results.json"
    if not path.exists():
        raise UsageError(f"{path}: no such file; an evaluation that ended has one")
    return json.loads(path.read_text(encoding="utf-8"))


def _write_page(args: argparse.Namespace) -> None:
    from rorqual.report.evaluation import evaluation_page
    from rorqual.runlog import write_atomically

    runs = [read_results(Path(directory)) for directory in (args.out, *args.beside)]
    write_atomically(Path(args.out) / "index.html", evaluation_page(runs))


def _list(as_json: bool) -> None:
    from rorqual.evals.catalogue import BENCHMARKS

    facts = [{"name": b.name, "title": b.title, "source": b.source, "licence": b.licence, "notes": b.notes}
             for b in BENCHMARKS.values()]  # fmt: skip
    if as_json:
        print(json.dumps(facts))
        return
    for fact in facts:
        print(f"{fact['name']:<18} {fact['title']}  [{fact['licence']}; {fact['source']}]")


def _text(results: dict[str, Any]) -> str:
    score, attempts = results["score"], results["passed_attempts"]
    lines = [
        f"{results['benchmark']}  {results['policy']}  context {results['context']}",
        f"score              {_rate(score)} over {results['tasks']} tasks, {results['samples']} attempts each",
        f"passed attempts    {attempts['passed']} of {attempts['of']} scored ({_rate(attempts)})",
        *(f"pass@{k:<13} {_rate(found)} over {found['tasks']} tasks" for k, found in results["pass_at_k"].items()),
    ]
    if results["samples"] > 1:
        lines.append(f"majority           {_rate(results['majority'])}")
    if results["unscored_attempts"]:
        lines.append(f"WITHOUT A SCORE    {results['unscored_attempts']} attempts; score if all of them failed: "
                     f"{100 * results['score_if_unscored_fail']:.1f} %")  # fmt: skip
    if results["defective_rows"]:
        first = results["defective_rows"][0]
        lines.append(f"DEFECTIVE ROWS     {len(results['defective_rows'])}, left out; {first['where']}: {first['what']}")
    for name, found in results["outcomes"].items():
        if found:
            lines.append(f"{name:<18} {', '.join(f'{key} {count}' for key, count in found.items())}")
    spent = {name: value for name, value in results["accounts"].items() if value}
    lines.append("accounts           " + ", ".join(f"{name} {_amount(value)}" for name, value in spent.items()))
    if results["extra"]:
        lines += _contest_lines(results["extra"])
    if comparison := results.get("comparison"):
        lines.append(f"against {comparison['first']}: {_rate(comparison['difference'])}, {comparison['wins']} tasks better, "
                     f"{comparison['losses']} worse, p = {comparison['p_value']:.3g}")  # fmt: skip
    if results["published"]:
        lines.append("published          " + ", ".join(f"{name} {value:g}" for name, value in results["published"].items()))
    return "\n".join(lines)


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def _page(args: argparse.Namespace) -> str:
    return f"; the page is {Path(args.out) / 'index.html'}" if args.page else ""


def _contest_lines(contest: dict[str, Any]) -> list[str]:
    total = f"{contest['points']:g} of {contest['of']:g} points, " if "points" in contest else ""
    lines = [f"{contest['rule']:<18} {total}{contest['solved']} of {len(contest['problems'])} problems solved"]
    for name, found in contest["problems"].items():
        at = f", accepted at submission {found['accepted_at']}" if found["accepted_at"] else ""
        lines.append(f"  {name:<16} {found['points']:g} of {found['of']:g}; {found['submitted']} submitted of "
                     f"{found['attempts']} attempts{at}")  # fmt: skip
    return lines + [f"published          {name}: {text}" for name, text in contest["published"].items()]


def _rate(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return "none"
    return f"{100 * found['value']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
