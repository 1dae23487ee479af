"""The built-in problems: right values, splits that can't overlap, and worked documents that say what they mean."""

from __future__ import annotations

import ast
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.arithmetic import (
    HELDOUT_SHARE,
    KINDS,
    CorpusMix,
    corpus_document,
    draw_problem,
    eval_step,
    generate_documents,
    generate_tasks,
    is_heldout,
    make_problem,
    work_step,
    worked_thought,
)
from rollout.records import Task
from verifiers.registry import resolve

LAW = settings(deadline=None, derandomize=True, max_examples=100)
SEEDS = st.integers(0, 2**32)


def value_of(text: str) -> int:
    """An expression's value in integers, by Python's own precedence."""

    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            left, right = walk(node.left), walk(node.right)
            return left * right if isinstance(node.op, ast.Mult) else left + right
        assert isinstance(node, ast.Constant)
        assert isinstance(node.value, int)
        return node.value

    tree = ast.parse(text, mode="eval")
    assert not {type(node) for node in ast.walk(tree)} - {
        ast.Expression,
        ast.BinOp,
        ast.Add,
        ast.Mult,
        ast.Constant,
    }
    return walk(tree.body)


def strictly_left_to_right(text: str) -> int:
    """The value of an expression without brackets to someone who knows no precedence."""
    first, *rest = text.split()
    value = int(first)
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        value = eval_step(value, sign, int(number))
    return value


@LAW
@given(SEEDS, st.sampled_from(KINDS))
def test_values_are_those_of_the_expression(seed: int, kind: str) -> None:
    problem = make_problem(random.Random(seed), kind)
    assert problem.value == value_of(problem.text)
    assert problem.kind == kind
    assert all(11 <= int(n) <= 99 or 2 <= int(n) <= 9 for n in re.findall(r"\d+", problem.text))


@LAW
@given(SEEDS, st.sampled_from(KINDS))
def test_steps_lead_to_the_value_and_careless_steps_to_the_careless_one(seed: int, kind: str) -> None:
    problem = make_problem(random.Random(seed), kind)
    careless = (
        strictly_left_to_right(problem.text) if "(" not in problem.text else value_of(re.sub("[()]", "", problem.text))
    )
    for steps, reached in ((problem.steps, problem.value), (problem.left_to_right, careless)):
        known = [int(number) for number in re.findall(r"\d+", problem.text)]
        for left, sign, right in steps:
            known.remove(left)
            known.remove(right)
            known.append(eval_step(left, sign, right))
        assert known == [reached]


@LAW
@given(SEEDS, SEEDS, st.integers(0, 10**6))
def test_no_seed_brings_a_problem_into_both_splits(one: int, other: int, start: int) -> None:
    training = {task.prompt for task in generate_tasks(one, "train", start, 15)}
    held_out = {task.prompt for task in generate_tasks(other, "heldout", 0, 15)}
    corpus = {task.prompt for task in generate_documents(other, "train", start, 15)}
    assert not held_out & (training | corpus)
    assert all(is_heldout(str(text)) for text in held_out)
    assert not any(is_heldout(str(text)) for text in training | corpus)


def test_one_problem_in_eight_is_held_out_of_every_kind() -> None:
    rng = random.Random(0)
    for kind in KINDS:
        texts = {make_problem(rng, kind).text for _ in range(2000)}
        assert sum(map(is_heldout, texts)) / len(texts) == pytest.approx(1 / HELDOUT_SHARE, abs=0.03)


def test_the_split_of_a_text_never_changes() -> None:
    """Models trained on one version must not meet their training problems as held-out ones of another."""
    assert [is_heldout(f"{a} + 12 * 3") for a in range(11, 31)] == [a in {16, 17, 21, 24} for a in range(11, 31)]


@LAW
@given(SEEDS, st.sampled_from(["train", "heldout"]), st.integers(0, 1000), st.integers(0, 12))
def test_tasks_are_a_window_of_one_endless_sequence(seed: int, split: str, start: int, count: int) -> None:
    tasks = generate_tasks(seed, split, start, count)
    assert tasks == generate_tasks(seed, split, start, count + 3)[:count]
    assert [task.task_id for task in tasks] == [f"arithmetic-{split}/{i}" for i in range(start, start + count)]
    for task in tasks:
        assert isinstance(task.prompt, str)
        assert task.answer == value_of(task.prompt)
        assert task.metadata["kind"] in KINDS
        assert task.verifier == "numeric"


def test_other_seeds_give_other_tasks_and_kinds_can_be_chosen() -> None:
    assert generate_tasks(0, "train", 0, 20) != generate_tasks(1, "train", 0, 20)
    assert {task.metadata["kind"] for task in generate_tasks(0, "train", 0, 100)} == set(KINDS)
    chosen = generate_tasks(0, "heldout", 0, 30, ["bracket_product"])
    assert {task.metadata["kind"] for task in chosen} == {"bracket_product"}
    assert all(re.fullmatch(r"\(\d\d \+ \d\d\) \* \d", str(task.prompt)) for task in chosen)


def test_unknown_splits_and_kinds_are_named() -> None:
    with pytest.raises(ValueError, match="unknown split 'test'; the splits are train and heldout"):
        generate_tasks(0, "test", 0, 1)
    with pytest.raises(ValueError, match="unknown kind of problem 'cubes'; the kinds are sum_product"):
        generate_tasks(0, "train", 0, 1, ["cubes"])
    with pytest.raises(ValueError, match="split must be train"):
        generate_documents(0, "heldout", 0, 1)


@LAW
@given(st.integers(0, 10**7), st.integers(0, 10**7), st.sampled_from("+*"), SEEDS)
def test_a_careful_step_is_exact_in_every_digit(left: int, right: int, sign: str, seed: int) -> None:
    right = right % 10 if sign == "*" else right
    text, result = work_step(left, sign, right, random.Random(seed), slip=0.0)
    assert result == eval_step(left, sign, right)
    head, _, tail = text.partition(": ")
    digits, _, end = tail.partition(" -> ")
    assert head == f"{'Multiply' if sign == '*' else 'Add'} {left}{sign}{right}"
    assert end == str(result)
    for operation in digits.split(", "):
        expression, _, claimed = operation.partition("=")
        assert value_of(re.sub(r"\b0+(?=\d)", "", expression)) == int(claimed)


@LAW
@given(SEEDS, st.sampled_from(KINDS))
def test_careful_thoughts_end_in_the_right_value(seed: int, kind: str) -> None:
    rng = random.Random(seed)
    problem = make_problem(rng, kind)
    thought, value = worked_thought(problem, rng, slip=0.0, ignore_precedence=False)
    assert value == problem.value
    lines = thought.split("\n")
    assert len(lines) == len(problem.steps)
    assert lines[-1].endswith(f"-> {problem.value}")


@LAW
@given(SEEDS, st.sampled_from(KINDS))
def test_a_slip_is_carried_on_to_later_steps(seed: int, kind: str) -> None:
    rng = random.Random(seed)
    thought, value = worked_thought(make_problem(rng, kind), rng, slip=0.7, ignore_precedence=False)
    lines = thought.split("\n")
    results = [int(line.rpartition("-> ")[2]) for line in lines]
    assert results[-1] == value
    last_operands = [int(n) for n in re.findall(r"\d+", lines[-1].partition(":")[0])]
    assert results[-2] in last_operands


def test_slips_are_as_frequent_as_asked_for() -> None:
    rng = random.Random(0)
    wrong = sum(work_step(123, "+", 456, rng, slip=0.1)[1] != 579 for _ in range(3000)) / 3000
    assert wrong == pytest.approx(1 - 0.9**3, abs=0.03)


@LAW
@given(SEEDS, st.integers(0, 1000), st.integers(0, 8))
def test_documents_are_a_window_of_one_endless_sequence(seed: int, start: int, count: int) -> None:
    documents = generate_documents(seed, "train", start, count)
    assert documents == generate_documents(seed, "train", start, count + 3)[:count]
    assert [task.task_id for task in documents] == [f"arithmetic-corpus/{i}" for i in range(start, start + count)]


@LAW
@given(SEEDS, st.booleans())
def test_a_careful_document_scores_full_marks(seed: int, worked: bool) -> None:
    share = float(worked)
    (document,) = generate_documents(seed, "train", 3, 1, share, share, (), ignore_precedence=0, slip=0, untagged=0)
    task = Task(task_id="t", prompt=document.prompt, answer=value_of(str(document.prompt)))
    for name in ("numeric", "format"):
        verdict = resolve(name)(document.answer, task)
        assert verdict.status == "correct", (name, verdict.reason)
    assert (":" in document.answer) == worked


def test_the_mix_is_kept() -> None:
    mix = CorpusMix(
        worked=0.6, worked_rare=0.0, rare_kinds=("sum_product",), ignore_precedence=0, slip=0, untagged=0.25
    )
    documents = [corpus_document(random.Random(i), mix) for i in range(2000)]
    rare = [re.fullmatch(r"\d\d \+ \d\d \* \d", question) is not None for question, _ in documents]
    worked = [":" in completion for _, completion in documents]
    assert not any(w for w, r in zip(worked, rare, strict=True) if r)
    assert sum(worked) / (len(rare) - sum(rare)) == pytest.approx(0.6, abs=0.04)
    untagged = [not completion.startswith("<think>\n") for _, completion in documents]
    assert sum(untagged) / 2000 == pytest.approx(0.25, abs=0.04)
    assert all("<" not in c for (_, c), bare in zip(documents, untagged, strict=True) if bare)


def test_documents_that_ignore_precedence_are_wrong_where_it_matters() -> None:
    mix = CorpusMix(worked=1, worked_rare=1, ignore_precedence=1, slip=0, untagged=0)
    for seed in range(60):
        question, completion = corpus_document(random.Random(seed), mix)
        claimed = int(re.findall(r"<answer>(\d+)</answer>", completion)[0])
        matters = re.fullmatch(r"\d+ \* \d+ \+ \d+", question) is None
        assert (claimed != value_of(question)) == matters, question


def test_a_split_is_drawn_until_it_is_met() -> None:
    rng = random.Random(0)
    assert all(is_heldout(draw_problem(rng, "heldout").text) for _ in range(30))
    assert not any(is_heldout(draw_problem(rng, "train").text) for _ in range(30))
