"""The benchmarks by name, each with its protocol, source and licence."""

from __future__ import annotations

from rorqual.errors import UserError
from rorqual.evals import browse, choices, contests, mathematics, needles, programs, repositories, retail, scenarios, stores
from rorqual.evals.benchmark import BOXED, Benchmark, Protocol
from rorqual.evals.source import Hub

MATHEMATICS = Protocol(BOXED)


def _mathematics(
    name: str, title: str, source: str, licence: str, hub: Hub | None, published: str = "", read=mathematics.read_problem
):
    return Benchmark(
        name, title, source, licence, MATHEMATICS, mathematics.loader(read), hub, mathematics.answer_of, published=published,
        is_judged=True,
    )  # fmt: skip


def _choices(
    name: str, title: str, source: str, licence: str, hub: Hub, published: str, read, template: str = choices.INSTRUCTION
):
    return Benchmark(
        name, title, source, licence, Protocol(template), choices.loader(read), hub, choices.answer_of, published=published,
        is_judged=name == "hle",
    )  # fmt: skip


BENCHMARKS: dict[str, Benchmark] = {
    each.name: each
    for each in (
        _mathematics(
            "gsm8k", "GSM8K", "Cobbe et al. 2021, github.com/openai/grade-school-math", "MIT",
            Hub("openai/gsm8k", "main/test-*.parquet"), read=mathematics.read_gsm8k,
        ),
        _mathematics(
            "math", "MATH (500 problems)", "Hendrycks et al. 2021, in the selection of Lightman et al. 2023", "MIT",
            Hub("HuggingFaceH4/MATH-500", "test.jsonl"),
        ),
        _mathematics(
            "imo_answerbench", "IMO-AnswerBench", "Google DeepMind 2025, github.com/google-deepmind/superhuman", "CC-BY-4.0",
            None, "IMOAnswerBench",
        ),
        _mathematics(
            "aime_2025", "AIME 2025", "MathArena's transcription; the problems are the MAA's", "CC-BY-NC-SA-4.0",
            Hub("MathArena/aime_2025", "data/*.parquet"), "AIME 2025",
        ),
        _mathematics(
            "hmmt_feb_2025", "HMMT February 2025", "MathArena's transcription; the problems are HMMT's", "CC-BY-NC-SA-4.0",
            Hub("MathArena/hmmt_feb_2025", "data/*.parquet"), "HMMT Feb 2025",
        ),
        _mathematics(
            "hmmt_nov_2025", "HMMT November 2025", "MathArena's transcription; the problems are HMMT's", "CC-BY-NC-SA-4.0",
            Hub("MathArena/hmmt_nov_2025", "data/*.parquet"), "HMMT Nov 2025",
        ),
        _choices(
            "gpqa_diamond", "GPQA Diamond", "Rein et al. 2023 (access on the hub is by agreement)", "CC-BY-4.0",
            Hub("Idavidrein/gpqa", "gpqa_diamond.csv"), "GPQA Diamond", choices.read_gpqa,
        ),
        _choices(
            "mmlu_pro", "MMLU-Pro", "Wang et al. 2024, TIGER-Lab", "MIT", Hub("TIGER-Lab/MMLU-Pro", "data/test-*.parquet"),
            "MMLU-Pro", choices.read_mmlu_pro,
        ),
        _choices(
            "hle", "Humanity's Last Exam, text only", "Phan et al. 2025, Center for AI Safety and Scale AI", "MIT",
            Hub("cais/hle", "data/test-*.parquet"), "HLE (text)", choices.read_hle, BOXED,
        ),
        Benchmark(
            "humaneval", "HumanEval", "Chen et al. 2021, github.com/openai/human-eval", "MIT",
            Protocol(programs.COMPLETE), programs.loader(programs.read_humaneval, programs.score_function),
            Hub("openai/openai_humaneval", "openai_humaneval/test-*.parquet"),
            answer_of=lambda text: None,
        ),
        Benchmark(
            "livecodebench", "LiveCodeBench", "Jain et al. 2024, livecodebench.github.io", "CC",
            Protocol(programs.SOLVE), programs.loader(programs.read_livecodebench, programs.score_cases),
            Hub("livecodebench/code_generation_lite", "test*.jsonl"), answer_of=lambda text: None,
            published="LiveCodeBench (CoT)", notes="choose the paper's window (2024.08-2025.04) by giving a file of it",
        ),
        Benchmark(
            "contest", "A contest with subtasks (IOI), or with one each (ICPC)", "your files: see docs/evaluation.md", "yours",
            Protocol(programs.SOLVE), programs.loader(contests.read_contest, contests.score_contest),
            answer_of=lambda text: None, extra=contests.contest_table,
            notes="score: of one attempt each; the contest's own comes from --n attempts by --rule and --submissions",
        ),
        Benchmark(
            "needles", "Needle retrieval", "made here from the seed; after Kamradt 2023", "Apache-2.0",
            Protocol(needles.TEMPLATE, max_tokens=1024, thinking=False), needles.load_needles, answer_of=needles.answer_of,
        ),
        Benchmark(
            "ruler", "A RULER-like set: several needles, tracing of variables, commonest words", "made here from the seed; "
            "after Hsieh et al. 2024", "Apache-2.0", Protocol(needles.TEMPLATE, max_tokens=1024, thinking=False),
            needles.load_ruler, answer_of=needles.answer_of,
        ),
        Benchmark(
            "browse", "BrowseComp-style questions over a local corpus", "your files (docs/evaluation.md); after Wei et al. 2025",
            "yours", Protocol(browse.TEMPLATE, max_turns=512), browse.load, answer_of=mathematics.answer_of,
            published="BrowseComp", is_judged=True,
            notes="a local corpus in place of the web, so that no score compares with the paper's",
        ),
        Benchmark(
            "tau2_retail", "tau2-bench, retail", "Barres et al. 2025, github.com/sierra-research/tau2-bench", "MIT",
            Protocol(max_turns=100), retail.load, published="tau2-bench",
            notes="published: the mean of three categories (retail 81.1); the tools are our own; --user plays the user",
        ),
        Benchmark(
            "bfcl_multi_turn", "Berkeley Function-Calling Leaderboard, multi-turn",
            "Patil et al. 2025 (version 3), github.com/ShishirPatil/gorilla", "Apache-2.0", Protocol(max_turns=160),
            scenarios.load, answer_of=lambda text: None,
            notes="judged by state and responses after each turn, as the original; functions that come late come as text",
        ),
        Benchmark(
            "repositories", "SWE-bench-style directories", "your files (docs/evaluation.md); after Jimenez et al. 2023", "yours",
            Protocol(repositories.TEMPLATE, max_turns=128), repositories.load, answer_of=lambda text: None,
            notes="the published scores are of other tasks; --program-timeout bounds each command and the tests",
        ),
        Benchmark(
            "heldout", "The held-out split of a store of synthesised tasks", "rorqual synthesize; --data names the store",
            "that of the store's sources", Protocol(max_turns=64), stores.load,
            reference=stores.reference, corrupted=lambda task: "Answer: none of these",
        ),
    )
}  # fmt: skip


def benchmark(name: str) -> Benchmark:
    """A benchmark by name. Raises UserError that lists them."""
    if name not in BENCHMARKS:
        raise UserError(f"there is no benchmark {name!r}; there are {', '.join(sorted(BENCHMARKS))}")
    return BENCHMARKS[name]
