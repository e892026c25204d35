"""Equality of mathematical answers: hard cases, each by hand; what cannot be decided is never called wrong."""

from __future__ import annotations

import pytest

from rorqual.evals.answers import boxed, choice, code_block, final_answer
from rorqual.evals.equality import EqualityError, Judge, equal, tidy

EQUAL = [
    # fractions and decimals
    (r"\frac{1}{2}", "0.5"), (r"\frac{3}{4}", "3/4"), (r"\frac12", r"\dfrac{1}{2}"), (r"1\frac{1}{2}", r"\frac{3}{2}"),
    (r"2\frac{3}{4}", "2.75"), (r"\frac{-1}{2}", r"-\frac12"), ("11/2", "5.5"), ("6.0", "6"), (r"-\frac{10}{3}", "-10/3"),
    (r"\frac{a}{b}", "a/b"), (r"\frac{\pi}{2}", r"\pi/2"),
    # thousands, currency, percent, degrees, units
    ("1,000", "1000"), ("1{,}234{,}567", "1234567"), (r"\$18.90", "18.9"), (r"\$2{,}125", "2125"), (r"50\%", "50"),
    (r"50\%", "0.5"), (r"90^\circ", "90"), (r"10\text{ cm}", "10"), ("10 cm", r"10\text{ cm}"), (r"3 \text{ hours}", "3 hour"),
    # names of what is asked
    ("x=5", "5"), ("5", "x = 5"), ("y=2x+1", "2x+1"), (r"x\in[1,2]", "[1,2]"),
    # intervals, unions, inequalities
    (r"(-\infty,0]", r"\left(-\infty, 0\right]"), (r"(-\infty,0)\cup(1,\infty)", r"(1,\infty)\cup(-\infty,0)"),
    (r"x\le 3", r"(-\infty,3]"), (r"\mathbb{R}", r"(-\infty,\infty)"),
    # sets, lists, plus or minus
    (r"\{1,2,3\}", r"\{3,1,2\}"), ("1,2,3", "3,2,1"), (r"1 \text{ and } 2", "2,1"), (r"\pm 2", "2,-2"),
    (r"\pm\sqrt{2}", r"\{\sqrt 2,-\sqrt 2\}"), (r"-\frac{2}{3},0,\frac{2}{3}", r"\{0, 2/3, -2/3\}"), (r"\emptyset", r"\{\}"),
    # tuples and matrices
    (r"\left(\frac12,3\right)", "(0.5,3)"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    # algebra
    (r"\sqrt{8}", r"2\sqrt{2}"), (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"), ("(x+1)^2", "x^2+2x+1"), ("a^{2}b", "ba^2"),
    (r"\sin^2 x+\cos^2 x", "1"), (r"\sqrt[3]{8}", "2"), (r"\ln 4", r"2\ln 2"), (r"\log_2 8", "3"), ("x^2+y^2=1", "y^2+x^2=1"),
    (r"\lfloor \log_2 a\rfloor+1", r"1+\lfloor\log_2(a)\rfloor"), (r"2^{u-2}", r"\frac{2^u}{4}"),
    # numbers in other forms
    ("2^{10}", "1024"), ("10!", "3628800"), (r"\binom{5}{2}", "10"), (r"1.2\times 10^3", "1200"), ("2516_8", "2516"),
    ("3+4i", "4i+3"), (r"e^{i\pi}", "-1"),
    # functions and words
    ("g(x)=2x^3+c, g(x)=-2x^3+c", "g(x)=-2x^3+c, g(x)=2x^3+c"), (r"\text{Evelyn}", "evelyn"), (r"\text{odd }n", "odd n"),
    (r"\text{(C)}", "C"), ("7:30", "7:30"), ("42.", "$42$"),
]  # fmt: skip
UNEQUAL = [
    ("0.33", "1/3"), (r"\frac{1}{3}", "0.3333"), ("[1,2)", "(1,2]"), ("(1,2)", "(2,1)"), (r"(0,1)", "[0,1]"),
    (r"10\text{ cm}", r"10\text{ m}"), ("10 cm", "10 kg"), (r"\{1,2\}", r"\{1,2,3\}"), ("1,2", "1"), (r"\pm 2", "2"),
    ("x>2", r"x\ge 2"), (r"\infty", r"-\infty"), (r"\text{Evelyn}", "Alice"), ("A", "B"), ("12", "21"), ("-5", "5"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\4&3\end{pmatrix}"), ("x^2", "x^3"), (r"\sqrt 2", "1.41"),
    (r"\text{odd }n", r"\text{even }n"), ("1000", "1,001"), (r"\frac{1}{2}", r"\frac{2}{1}"), ("5", "no idea"),
    ("(1,000)", "(1,0)"), ("i", "-i"), ("2^{10}", "20"),
]  # fmt: skip


def test_there_are_at_least_sixty_hard_cases():
    assert len(set(EQUAL)) >= 60 and len(set(UNEQUAL)) >= 25


@pytest.mark.parametrize("gold, answer", EQUAL)
def test_equal_answers_are_equal_whichever_is_gold(gold, answer):
    assert equal(gold, answer)
    assert equal(answer, gold)


@pytest.mark.parametrize("gold, answer", UNEQUAL)
def test_unequal_answers_are_unequal_whichever_is_gold(gold, answer):
    assert not equal(gold, answer)


def test_a_comparison_that_hangs_is_undecided_and_the_next_one_works():
    judge = Judge(patience_s=0.01)
    with pytest.raises(EqualityError, match="no decision within"):
        judge.equal("12345", "54321")
    judge.patience_s = 60
    assert judge.equal("1/2", "0.5") and not judge.equal("1", "2")
    judge.close()


def test_tidy_keeps_what_has_meaning():
    assert tidy(r"$\left( 1,\, 2 \right)$.") == "( 1, 2 )" and tidy("1,2,3") == "1,2,3" and tidy("(1,200)") == "(1200)"


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"), (r"\boxed{1} no, \boxed{2}", "2"), (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed {7}", "7"), (r"\fbox{x}", "x"), (r"\boxed{unclosed", None), ("nothing", None), (r"\boxed{1} \boxed{2", "1"),
    ],
)  # fmt: skip
def test_the_last_closed_box_is_the_answer(text, answer):
    assert boxed(text) == answer


def test_the_final_answer_is_boxed_or_after_the_marks():
    assert final_answer("steps\n#### 1,200\n") == "1,200" and final_answer(r"#### 3 \boxed{4}") == "4"
    assert final_answer("the answer is 5") is None and final_answer(r"\boxed{}") is None and final_answer("####") is None


@pytest.mark.parametrize(
    "text, letter",
    [
        ("The answer is (C).", "C"), (r"\boxed{\text{B}}", "B"), (r"\boxed{d}", "D"), ("Answer: A", "A"), ("**Answer: B**", "B"),
        ("B", "B"), ("answer is A... no, the answer is D", "D"), ("I like A", None), (r"\boxed{Z}", None), ("", None),
        (r"\boxed{A) because}", "A"), ("the answer is Alice", None),
    ],
)  # fmt: skip
def test_a_choice_is_found_where_one_was_made(text, letter):
    assert choice(text, "ABCD") == letter


def test_a_program_is_the_last_whole_block():
    assert code_block("a\n```python\nx = 1\n```\nb\n```\ny\n```") == "y\n" and code_block("x = 1") == "x = 1"
    assert code_block("```python\nx = 1") is None
