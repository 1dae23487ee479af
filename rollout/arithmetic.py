"""Seeded arithmetic problems that need several steps, and the corpus of worked documents a base model is trained on.

A problem is an expression of two-digit numbers and one-digit factors with precedence or brackets, such as `37 + 48 * 2`.
Which split a problem belongs to is a property of its text, so training and held-out problems can't overlap, whatever
their seeds.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from rollout.records import Task

HELDOUT_SHARE = 8  # one expression in eight


@dataclass(frozen=True)
class Problem:
    """An expression, its value, and its operations in the right order; `left_to_right` ignores precedence."""

    text: str
    value: int
    kind: str
    steps: tuple[tuple[int, str, int], ...]
    left_to_right: tuple[tuple[int, str, int], ...]


KINDS = ("sum_product", "product_sum", "bracket_product", "product_product", "bracket_product_sum")


def make_problem(rng: random.Random, kind: str) -> Problem:
    """One random problem of a kind: numbers 11-99, factors 2-5."""
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    c, d = rng.randint(2, 5), rng.randint(2, 5)
    e = rng.randint(11, 99)
    if kind == "sum_product":
        return Problem(
            f"{a} + {b} * {c}", a + b * c, kind, ((b, "*", c), (a, "+", b * c)), ((a, "+", b), (a + b, "*", c))
        )
    if kind == "product_sum":
        steps = ((a, "*", c), (a * c, "+", b))
        return Problem(f"{a} * {c} + {b}", a * c + b, kind, steps, steps)
    if kind == "bracket_product":
        return Problem(
            f"({a} + {b}) * {c}", (a + b) * c, kind, ((a, "+", b), (a + b, "*", c)), ((b, "*", c), (a, "+", b * c))
        )
    if kind == "product_product":
        return Problem(
            f"{a} * {c} + {b} * {d}",
            a * c + b * d,
            kind,
            ((a, "*", c), (b, "*", d), (a * c, "+", b * d)),
            ((a, "*", c), (a * c, "+", b), (a * c + b, "*", d)),
        )
    if kind == "bracket_product_sum":
        return Problem(
            f"({a} + {b}) * {c} + {e}",
            (a + b) * c + e,
            kind,
            ((a, "+", b), (a + b, "*", c), ((a + b) * c, "+", e)),
            ((b, "*", c), (a, "+", b * c), (a + b * c, "+", e)),
        )
    raise ValueError(f"unknown kind of problem {kind!r}; the kinds are {', '.join(KINDS)}")


def is_heldout(text: str) -> bool:
    """Whether an expression belongs to the held-out split, by its text alone."""
    return hashlib.blake2b(text.encode(), digest_size=4).digest()[0] % HELDOUT_SHARE == 0


def draw_problem(rng: random.Random, split: str, kinds: tuple[str, ...] = KINDS) -> Problem:
    """A random problem of a split ("train" or "heldout")."""
    if split not in ("train", "heldout"):
        raise ValueError(f"unknown split {split!r}; the splits are train and heldout")
    while True:
        problem = make_problem(rng, rng.choice(kinds))
        if is_heldout(problem.text) == (split == "heldout"):
            return problem


def generate_tasks(
    seed: int, split: str, start: int, count: int, kinds: tuple[str, ...] | list[str] = KINDS
) -> list[Task]:
    """Problems `start` .. `start + count` of the endless sequence that `seed` defines."""
    tasks = []
    for index in range(start, start + count):
        problem = draw_problem(random.Random(f"{seed}/{split}/{index}"), split, tuple(kinds))
        tasks.append(
            Task(
                task_id=f"arithmetic-{split}/{index}",
                prompt=problem.text,
                answer=problem.value,
                verifier="numeric",
                metadata={"kind": problem.kind},
            )
        )
    return tasks


def work_step(left: int, sign: str, right: int, rng: random.Random, slip: float) -> tuple[str, int]:
    """One operation digit by digit with carries, as text, and its result; each digit goes wrong with probability `slip`."""
    first = [int(x) for x in reversed(str(left))]
    second = [int(x) for x in reversed(str(right))] if sign == "+" else []
    length = max(len(first), len(second))
    first += [0] * (length - len(first))
    second += [0] * (length - len(second))
    carry, digits, worked = 0, [], []
    for position in range(length):
        value = first[position] * right + carry if sign == "*" else first[position] + second[position] + carry
        if rng.random() < slip:
            value = max(0, value + rng.choice((-2, -1, 1, 2, 10)))
        other = right if sign == "*" else second[position]
        worked.append(f"{first[position]}{sign}{other}" + (f"+{carry}" if carry else "") + f"={value}")
        digits.append(value % 10)
        carry = value // 10
    if carry:
        digits.append(carry)
    result = int("".join(str(x) for x in reversed(digits)))
    # The verb comes first: it settles which numbers follow before the first of them is written.
    verb = "Multiply" if sign == "*" else "Add"
    return f"{verb} {left}{sign}{right}: {', '.join(worked)} -> {result}", result


def worked_thought(problem: Problem, rng: random.Random, slip: float, ignore_precedence: bool) -> tuple[str, int]:
    """All operations of a problem worked out, one per line, with results carried on, and the value reached."""
    steps = problem.left_to_right if ignore_precedence else problem.steps
    lines: list[str] = []
    reached: dict[int, int] = {}
    result = 0
    for left, sign, right in steps:
        text, result = work_step(reached.get(left, left), sign, reached.get(right, right), rng, slip)
        reached[eval_step(left, sign, right)] = result
        lines.append(text)
    return "\n".join(lines), result


def eval_step(left: int, sign: str, right: int) -> int:
    """The exact result of one operation."""
    return left * right if sign == "*" else left + right


@dataclass(frozen=True)
class CorpusMix:
    """How careless the corpus is: shares of documents (0-1), and the probability that a worked digit is wrong."""

    worked: float = 0.9
    worked_rare: float = 0.4
    rare_kinds: tuple[str, ...] = ("bracket_product", "bracket_product_sum")
    ignore_precedence: float = 0.7
    slip: float = 0.02
    untagged: float = 0.1


def generate_documents(
    seed: int,
    split: str,
    start: int,
    count: int,
    worked: float = CorpusMix.worked,
    worked_rare: float = CorpusMix.worked_rare,
    rare_kinds: tuple[str, ...] | list[str] = CorpusMix.rare_kinds,
    ignore_precedence: float = CorpusMix.ignore_precedence,
    slip: float = CorpusMix.slip,
    untagged: float = CorpusMix.untagged,
) -> list[Task]:
    """Documents `start` .. `start + count` of the endless corpus that `seed` defines; `answer` is the completion's text."""
    if split != "train":
        raise ValueError("the corpus is made of training problems only: split must be train")
    mix = CorpusMix(worked, worked_rare, tuple(rare_kinds), ignore_precedence, slip, untagged)
    tasks = []
    for index in range(start, start + count):
        question, completion = corpus_document(random.Random(f"{seed}/corpus/{index}"), mix)
        tasks.append(Task(task_id=f"arithmetic-corpus/{index}", prompt=question, answer=completion))
    return tasks


def corpus_document(rng: random.Random, mix: CorpusMix) -> tuple[str, str]:
    """(question, completion without end token) of one document: worked or guessed, careful or not, tagged or not."""
    problem = draw_problem(rng, "train")
    share = mix.worked_rare if problem.kind in mix.rare_kinds else mix.worked
    if rng.random() < share:
        thought, value = worked_thought(problem, rng, mix.slip, rng.random() < mix.ignore_precedence)
    else:
        value = problem.value
        thought = f"Probably {value}"
    if rng.random() < mix.untagged:
        return problem.text, f"\n{thought}\n{value}"
    return problem.text, f"<think>\n{thought}\n</think>\n<answer>{value}</answer>"
