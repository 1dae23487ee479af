"""The benchmark's figures on a few rows, its sets, and the fuzzer's laws."""

import json
import random
import sys

import pytest
from rich.console import Console

from scripts.bench_magnitude import judge_all, magnitude_pairs, peak_mb
from scripts.bench_sets import BenchDataError, Pair, load_set
from scripts.bench_verifiers import magnitude_table, results_table, run_ours, run_peer
from scripts.fuzz_verifiers import MAX_INPUT_CHARS, check, inputs, mutate, seeds
from verifiers import Verdict

PAIRS = [
    Pair("a", "5", "\\boxed{5}", True),
    Pair("b", "5", "\\boxed{6}", False),
    Pair("c", "5", "\\boxed{6}", True),
    Pair("d", "5", "\\boxed{5}", False),
    Pair("e", "5", "no answer. None at all.", False),
]


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_figures_of_a_run():
    result = run_ours("x", PAIRS)
    assert (result.n, result.accuracy, result.unparsable, result.errors) == (5, 0.6, 1, 0)
    assert (result.false_positives, result.negatives, result.false_negatives, result.positives) == (1, 3, 1, 2)
    assert result.mistakes == ["FN c", "FP d"]
    assert 0 < result.median_ms <= result.p99_ms <= result.max_ms
    assert result.calls_per_s > 1000 / result.max_ms
    console = Console(width=170, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table([result]), magnitude_table({}))
    assert "1 / 3" in console.export_text()


def test_a_peer_runs_beside_on_the_same_rows(tmp_path):
    fake = tmp_path / "python"
    first, row = "{'math-verify':'0'}", "{'accepted':True,'seconds':.5}"
    answer = f"import sys,json\nprint(json.dumps({first}))\n[print(json.dumps({row})) for _ in sys.stdin]"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{answer}"\n')
    fake.chmod(0o755)
    result = run_peer("x", PAIRS, str(fake))
    assert (result.verifier, result.false_positives, result.false_negatives, result.max_ms) == (
        "math-verify 0",
        3,
        0,
        500,
    )
    fake.write_text('#!/bin/sh\necho \'{"math-verify": "0"}\'\necho broken >&2\n')
    with pytest.raises(BenchDataError, match="after 0 rows: broken"):
        run_peer("x", PAIRS, str(fake))


def test_sets(tmp_path):
    verdict = {"id": "i", "answer": "5", "completion": "6", "expected": False, "disputed": False}
    lines(tmp_path / "math_verdicts" / "cases_issues.jsonl", [verdict, {**verdict, "disputed": True}])
    assert load_set(tmp_path, "issues") == [Pair("i", "5", "6", False)]
    solved = {"question": "q", "ground_truth": "1+1\nA: 2", "m": {"is_correct": True, "solution": "A: 2"}}
    lines(tmp_path / "gsm8k_model_solutions" / "labelled.jsonl", [solved])
    assert load_set(tmp_path, "gsm8k") == [Pair("0/m", "2", "A: 2", True)]
    lines(
        tmp_path / "qwen_math_cot_outputs" / "math_cot.jsonl",
        [{"idx": 3, "gt": "2", "code": ["a", "b"], "score": [True, False]}],
    )
    assert [(pair.name, pair.expected) for pair in load_set(tmp_path, "qwen")] == [("3/0", True), ("3/1", False)]
    rows = [
        {"unique_id": str(i), "subject": "s", "answer": answer, "solution": f"s{i}"}
        for i, answer in enumerate(["1", "1", "2"])
    ]
    lines(tmp_path / "math500" / "test.jsonl", rows)
    assert [pair.answer for pair in load_set(tmp_path, "math_own")] == ["1", "1", "2"]
    assert [(pair.completion, pair.answer) for pair in load_set(tmp_path, "math_shuffled")] == [
        ("s1", "2"),
        ("s2", "1"),
    ]
    for name, says in (("published", "does not exist"), ("other", "unknown set")):
        with pytest.raises(BenchDataError, match=says):
            load_set(tmp_path, name)


def test_nothing_impossible_is_accepted_and_nothing_grows():
    report = judge_all()
    assert report["n"] == len(magnitude_pairs())
    assert report["accepted"] == []
    assert report["growth_mb"] < 300
    assert peak_mb() > 10


def test_the_fuzzer_finds_what_breaks_a_law():
    def raises(completion, task):
        raise KeyError("x")

    def lies(completion, task):
        return Verdict(score=1.0, status="wrong", reason="r")

    def good(completion, task):
        return Verdict(score=0.0, status="wrong", reason="r")

    assert check(good, "g", "c", 1.0, 100.0) is None
    for verifier, what in (
        (raises, "KeyError"),
        (lies, "score 1.0 with status wrong"),
        (lambda c, t: None, "returned None"),
    ):
        finding = check(verifier, "g", "c", 1.0, 100.0)
        assert finding is not None
        assert what in finding.what
        assert (finding.gold, finding.completion) == ("g", "c")
    slow = check(good, "g", "c", -1.0, 100.0)
    assert slow is not None
    assert slow.what == "slow"


def test_mutations_are_bounded_and_repeat_with_the_seed(tmp_path):
    lines(tmp_path / "a.jsonl", [{"answer": "\\frac12", "completion": "5", "other": "no"}, {"gold": "5"}])
    corpus = seeds([tmp_path / "a.jsonl"])
    assert corpus == ["\\frac12", "5"]
    rng = random.Random(3)
    texts = [mutate("\\frac12", corpus, rng) for _ in range(200)]
    assert max(map(len, texts)) <= MAX_INPUT_CHARS
    assert len(set(texts)) > 150
    first, second = inputs(corpus, random.Random(1)), inputs(corpus, random.Random(1))
    assert [next(first) for _ in range(20)] == [next(second) for _ in range(20)]
