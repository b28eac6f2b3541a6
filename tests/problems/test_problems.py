"""Problems that check themselves: the thoughts lead to the answer, and what is tested was never trained on."""

import itertools
import json
import random
import re
import subprocess
import sys

import pytest

from tiercel.problems import FAMILIES, LARGER_SIZE, TRAINED_SIZES, Problem, conversations, training
from tiercel.problems.written import add, divide, multiply, subtract

MANY = 100


def some(name, sizes=(*TRAINED_SIZES, LARGER_SIZE), count=120):
    rng = random.Random(f"tests {name}")
    for i in range(count):
        yield FAMILIES[name].make(rng, sizes[i % len(sizes)])


def test_there_are_enough_families():
    assert len(FAMILIES) >= 10
    named = "addition subtraction multiplication countdown word_problems sorting counting algebra".split()
    assert set(named) <= set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_right_answer_is_right_and_a_wrong_one_is_not(name):
    for problem in some(name):
        family = FAMILIES[name]
        assert problem.family == name and problem.question and problem.thinking
        assert family.correct(problem.answer, problem) and family.correct(f" {problem.answer}. ", problem)
        assert not family.correct("", problem) and not family.correct("I do not know", problem)
        assert not family.correct(problem.answer + "1", problem)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_equation_in_the_thoughts_is_true(name):
    """Whatever is written as a sum, difference, product or quotient of numbers holds."""
    checked = 0
    for problem in some(name):
        for line in re.split(r"[\n:;]|(?<=\d),| yes| no|\|", problem.thinking):
            sides = line.split("=")
            if len(sides) < 2 or not all(re.fullmatch(r"-?\d+([-+*/]\d+)*", side) for side in sides):
                continue
            values = {value(side) for side in sides}
            assert len(values) == 1, f"{line} in {problem}"
            checked += 1
    assert checked or name in ("sorting", "counting", "comparison", "reversing")


def value(text):
    """`3+4*5`, products and quotients first."""
    total = 0.0
    for term in re.findall(r"[+-]?\d+(?:[*/]\d+)*", text):
        product = 1.0
        for sign, number in re.findall(r"([*/]?)[+-]?(\d+)", term):
            product = product / int(number) if sign == "/" else product * int(number)
        total += -product if term.startswith("-") else product
    return total


@pytest.mark.parametrize("name", FAMILIES)
def test_the_answer_can_be_read_off_the_thoughts(name):
    """The last line holds what is answered, up to how it is put."""
    for problem in some(name):
        last = problem.thinking.split("\n")[-1]
        if name in ("reversing",):
            assert last.replace(",", "") == problem.answer
        elif name == "sorting":
            firsts = [line.split("|")[0] for line in problem.thinking.split("\n")]
            assert ", ".join([*firsts, last.split("|")[1]]) == problem.answer
        elif name == "countdown":
            assert f"({last})" in problem.answer
        elif name == "division":
            assert [int(n) for n in re.findall(r"\d+", last)] == [*map(int, re.findall(r"\d+", problem.answer)), 0][:2]
        elif name == "gcd":
            assert f"*{problem.answer}=" in last and last.endswith("=0")
        elif name == "modulo":
            assert last.endswith(f" r{problem.answer}")
        elif name == "counting":
            assert last.endswith(problem.answer)
        else:
            assert re.findall(r"-?\d+(?= r0$)|-?\d+$", last)[0].lstrip("-0") == problem.answer.split()[-1].lstrip("-0")


def test_written_arithmetic_is_right_for_all_kinds_of_numbers():
    rng = random.Random(0)
    pairs = [(rng.randrange(10 ** rng.randint(1, 5)), rng.randrange(10 ** rng.randint(1, 5))) for _ in range(2000)]
    for a, b in [*pairs, (0, 0), (10, 0), (100, 99), (99, 100), (1000, 1), (999, 1)]:
        lines, total = add(a, b)
        assert total == a + b and int(re.split(r"[|=]", lines[-1])[-1]) == total
        lines, left = subtract(a, b)
        assert left == a - b and lines[-1].lstrip("=").endswith(str(left))
        lines, product = multiply(a, b)
        assert product == a * b and int(re.split(r"[|=]", lines[-1])[-1]) == product
        if b:
            lines, quotient, left = divide(a, b)
            assert (quotient, left) == divmod(a, b) and lines[-1] == f"={quotient} r{left}"


# ── the split


@pytest.mark.parametrize("name", FAMILIES)
def test_no_problem_of_a_test_set_is_ever_trained_on(name):
    family = FAMILIES[name]
    tested = {p.key for p in family.test_set(100)}
    rng = random.Random(1)
    trained = [family.training(rng, size) for size in TRAINED_SIZES for _ in range(MANY)]
    assert len(tested) == 100 and not tested & {p.key for p in trained} and not any(p.held_out for p in trained)


def test_the_split_is_of_the_problem_and_not_of_its_words():
    rng = random.Random(0)
    by_key: dict[tuple[str, str], set[bool]] = {}
    questions: dict[tuple[str, str], set[str]] = {}
    for _ in range(8000):
        p = FAMILIES["multiplication"].make(rng, 2)
        by_key.setdefault((p.family, p.key), set()).add(p.held_out)
        questions.setdefault((p.family, p.key), set()).add(p.question)
    assert max(len(q) for q in questions.values()) > 5
    assert all(len(sides) == 1 for sides in by_key.values())
    asked = {tuple(map(int, re.findall(r"\d+", q)[:2])) for seen in questions.values() for q in seen}
    assert any((b, a) in asked for a, b in asked if a != b)  # 7 × 23 and 23 × 7 are one problem
    assert all(key == " ".join(map(str, sorted(map(int, key.split())))) for _, key in by_key if key)


def test_facts_of_one_digit_are_trained_and_not_tested():
    assert FAMILIES["addition"].test_set(10, size=1) == []
    assert all(max(map(int, re.findall(r"\d+", p.question))) > 9 for p in FAMILIES["addition"].test_set(200))


def test_test_sets_are_the_same_every_time_and_differ_by_seed():
    family = FAMILIES["word_problems"]
    assert family.test_set(20) == family.test_set(20)
    assert family.test_set(20) != family.test_set(20, seed=1)
    assert len({p.key for p in family.test_set(200)}) == 200


@pytest.mark.parametrize("name", FAMILIES)
def test_larger_problems_are_larger_than_any_that_is_trained(name):
    family = FAMILIES[name]
    larger = family.test_set(60, larger=True)
    assert larger and all(p.size == LARGER_SIZE for p in larger)
    trained = {p.key for p in some(name, TRAINED_SIZES, 200)}
    assert not trained & {p.key for p in larger}


def test_training_is_the_same_for_the_same_seed():
    first, second = (list(itertools.islice(training(3), 50)) for _ in range(2))
    assert first == second != list(itertools.islice(training(4), 50))
    assert all(isinstance(p, Problem) and not p.held_out for p in first)
    assert {p.family for p in itertools.islice(training(0), 3000)} == {*FAMILIES, "talk"}


def test_a_conversation_ends_with_thoughts_and_an_answer():
    found = list(itertools.islice(conversations(0), 2000))
    for messages in found:
        assert messages[-1]["role"] == "assistant" and re.fullmatch(r"(?s)<think>.*</think>.+", messages[-1]["content"])
        assert not any("<think>" in m["content"] for m in messages[:-1])
    assert {len(messages) for messages in found} >= {2, 3, 4, 6}


# ── countdown takes any solution


@pytest.mark.parametrize(
    "answer, right",
    [("(3*7)+6", True), ("6 + 7 × 3", True), ("7*3+6 = 27", True), ("3*7", False), ("3*7+6+0", False), ("27", False),
     ("(3*7+6", False), ("__import__('os')", False), ("6/(7-7)+3", False), ("3**3", False), ("", False)],
)  # fmt: skip
def test_any_expression_that_reaches_the_target_counts(answer, right):
    problem = Problem("countdown", "", "", "(3*7)+6", "x", 1, {"numbers": [6, 3, 7], "target": 27})
    assert FAMILIES["countdown"].correct(answer, problem) == right


# ── judged by others


RG = {  # ours → the name there, and the entry its scorer wants
    "addition": "chain_sum", "subtraction": "chain_sum", "multiplication": "products", "gcd": "gcd",
    "reversing": "spell_backward", "counting": "letter_counting",
}  # fmt: skip


@pytest.mark.parametrize("name", RG)
def test_reasoning_gym_gives_our_answers_full_marks(name):
    gym = pytest.importorskip("reasoning_gym")
    judge = gym.create_dataset(RG[name], size=1, seed=0)
    for p in some(name, count=40):
        entry = {"question": p.question, "answer": p.answer, "metadata": {}}
        assert judge.score_answer(p.answer, entry) == 1.0 and judge.score_answer("nothing", entry) < 1.0


def test_reasoning_gym_counts_our_countdowns_as_solved():
    gym = pytest.importorskip("reasoning_gym")
    judge = gym.create_dataset("countdown", size=1, seed=0)
    for p in some("countdown", count=60):
        entry = {"question": p.question, "answer": "-", "metadata": p.data}
        assert judge.score_answer(p.answer, entry) == 1.0, p


# ── the command


def test_the_command_writes_conversations_and_never_a_held_out_one(tmp_path):
    out = tmp_path / "some.jsonl"
    command = [sys.executable, "-m", "tiercel.problems", "write", "--count", "60", "--seed", "7", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "60 conversations" in done.stdout, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 60 and all(line["messages"][-1]["role"] == "assistant" for line in lines)
    first = out.read_bytes()
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert out.read_bytes() == first
    command[-1:] = ["--family", "sums", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no family 'sums'" in done.stderr and len(done.stderr.splitlines()) == 1
