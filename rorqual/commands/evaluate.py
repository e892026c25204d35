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
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rorqual.errors import FieldErrors, UsageError

CONTEXTS = ("none", "summary", "discard-75", "discard-all", "parallel-fewest-step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--benchmark", required=True, help="its name, or list")
    add("--policy", help="a checkpoint directory, an http(s) address, or program:NAME")
    add("--context", choices=CONTEXTS, default="none", help="what is done when a trajectory outgrows its window")
    add("--runs", type=int, default=4, help="N of parallel-fewest-step")
    add("--data", help="local file or directory of the benchmark (else the Hugging Face hub)")
    add("--split", default="test", help="of a store of tasks: test, test_combination, test_mechanism, train, all")
    add("--families", nargs="+", default=[], metavar="NAME", help="of a store of tasks: only these; all by default")
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
    add("--share", default="1/1", metavar="I/N", help="of every N tasks the I-th alone: for N processes, each with its own --out")
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
    from rorqual.evals.evaluation import evaluate

    if args.benchmark == "list":
        return _list(args.json)
    chosen = benchmark(args.benchmark)
    if args.policy is None or args.out is None:
        raise UsageError("--policy and --out are needed: what is measured, and where the attempts are kept")
    if max(args.k) > args.n or min(args.k) < 1:
        raise UsageError(f"--k {max(args.k)}: pass@k needs at least k attempts at each task, found --n {args.n}")
    if args.judge and not chosen.is_judged:
        raise UsageError(f"--judge: {chosen.name} is decided by its own scorer; a judge is for hle, browse and mathematics")
    results = evaluate(_asked(args, chosen), quiet=args.quiet or args.json)
    if args.compare:
        results["comparison"] = _compare(Path(args.compare), results)
    if args.page:
        _write_page(args)
    print(json.dumps(results) if args.json else f"{_text(results)}\nkept in            {args.out}{_page(args)}")


def _asked(args: argparse.Namespace, chosen: Any) -> Any:
    """Raises UsageError that names every flag out of range, before anything is made."""
    from rorqual.evals.evaluation import Evaluation, JudgeOptions
    from rorqual.evals.results import Prices
    from rorqual.rollout.endpoint import EndpointConfig

    problems: dict[str, str] = {}
    config: Any = _made(problems, lambda: _config(args), {"samples": "n"})
    options: Any = _made(problems, lambda: _options(args))
    for made in ("agent", "params") if config else ():
        _made(problems, lambda made=made: getattr(config, made)(chosen))
    # An endpoint's settings are checked here, since one is opened late.
    _made(
        problems, lambda: EndpointConfig("http://x", timeout_s=args.timeout, max_tries=args.max_tries), {"timeout_s": "timeout"}
    )
    judge = _made(problems, lambda: _judge(args, JudgeOptions), {"max_tokens": "judge-max-tokens"}) if args.judge else None
    _refuse(problems)
    asked = _made(problems, lambda: Evaluation(
        args.benchmark, args.policy, Path(args.out), config, options, _player(args), judge, tuple(args.k),
        Prices(*args.price), _workers(args), args.rescore, _share(args.share),
    ))  # fmt: skip
    _refuse(problems)
    return asked


def _refuse(problems: Mapping[str, str]) -> None:
    if problems:
        raise UsageError("; ".join(f"--{flag}: {text}" for flag, text in problems.items()))


def _made(problems: dict[str, str], make: Callable[[], Any], flags: Mapping[str, str] | None = None) -> Any:
    """What `make` gives; None where fields are out of range, which `problems` then names by their flags."""
    try:
        return make()
    except FieldErrors as error:
        flags = {"timeout_s": "program-timeout", **(flags or {})}
        problems |= {flags.get(name, name.replace("_", "-")): text for name, text in error.problems.items()}
        return None


def _judge(args: argparse.Namespace, options: Any) -> Any:
    template = Path(args.judge_template) if args.judge_template else None
    return options(args.judge, args.judge_model, template, args.judge_max_tokens)


def _workers(args: argparse.Namespace) -> Any:
    from rorqual.workers import Workers

    workers = Workers.parse(args.workers)
    if workers.engine == "local" and workers.count > 1:
        raise UsageError(f"--workers {args.workers}: on one machine --concurrency says how many attempts go on at a time")
    return workers


def _share(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise UsageError(f"--share {text}: expected I/N, the I-th of N shares of the tasks, such as 2/5")
    return int(index), int(count)


def _player(args: argparse.Namespace) -> Any:
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
    return Options(timeout_s=args.program_timeout, families=tuple(args.families), **{name: getattr(args, name) for name in names})


def _compare(other: Path, results: dict[str, Any]) -> dict[str, Any]:
    from rorqual.evals.evaluation import read_results
    from rorqual.evals.results import paired

    first = read_results(other)
    return {"first": str(other), "first_policy": first["policy"], **paired(first, results)}


def _write_page(args: argparse.Namespace) -> None:
    from rorqual.evals.evaluation import read_results
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
