"""The report: right numbers, nothing from outside, no text of a model as markup, and partial runs too."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo.report import write_report
from grpo.report_charts import CHARTS, MAX_POINTS, TIME_CHART, draw, series
from rollout.errors import UserError
from rollout.records import Group, Sample, Task
from rollout.run import RunRecord
from rollout.sample_table import Phase
from verifiers.verdict import Verdict

TOML = (
    'name = "demo"\nseed = 7\nnum_steps = 4\ngroup_size = 8\n'
    '[data]\nsource = "generator"\n[algorithm]\nkl_coef = 0.001\n'
    '[[rewards]]\nname = "accuracy"\nverifier = "numeric"\n'
    '[[rewards]]\nname = "format"\nverifier = "format"\nweight = 0.2\n'
    '[sampling]\ntemperature = 1.0\nnote = "<img src=x>"\n'
)
SUMMARY: dict[str, Any] = {
    "pass_at_1_before": 0.331,
    "pass_at_1_after": 0.897,
    "pass_at_k_before": 0.842,
    "pass_at_k_after": 0.983,
    "k": 16,
    "majority_at_k_before": 0.522,
    "majority_at_k_after": 0.931,
    "greedy_before": 0.61,
    "greedy_after": 0.5,
    "num_steps": 4,
    "wall_s": 431.2,
    "seconds_by_stage": {"base": 75.0, "sampling": 25.0},
    "logprob_gap_mean": 0.2,
    "engine": "vllm",
    "model": {"total_params": 3_120_000, "active_params": 1_310_000},
    "learning_or_sharpening": "Learning: pass@16 grew & more.",
}


def step_metrics(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "reward_mean": 0.25 * step,
        "accuracy": 0.2 * step,
        "completion_tokens_mean": 40.0,
        "completion_tokens_max": 64,
        "kl": 0.001 * step,
        "entropy": 0.5,
        "clip_fraction": 0.02,
        "logprob_gap_mean": 1e-3,
        "logprob_gap_max": 0.1,
        "grad_norm": float("inf") if step == 2 else 0.5,
        "loss": float("nan") if step == 2 else 0.01,
        "tokens_per_s": 9000.0,
        "seconds_sampling": 0.5,
        "seconds_scoring": 0.1,
        "seconds_learning": 1.2,
        "seconds_sync": 0.1,
        "seconds_other": 0.1,
        "seconds_total": 2.0,
        "status_correct": 10 * step,
        "status_wrong": 62 - 10 * step,
        "status_unparsable": 0,
        "status_timeout": 0,
        "status_error": 2,
        "skipped": int(step == 2),
    }


def make_groups(right: tuple[int, ...], text: str) -> list[Group]:
    """One group of 4 samples per entry, the first `right[i]` of them correct."""
    groups = []
    for row, num_right in enumerate(right):
        samples = []
        for index in range(4):
            status = "correct" if index < num_right else "wrong"
            verdict = Verdict(score=float(index < num_right), status=status, reason=f"reason <i>{status}</i>")
            samples.append(
                Sample(
                    task_id=f"demo/{row}",
                    sample_index=index,
                    prompt_ids=(1,),
                    completion_ids=(2, 3),
                    rollout_logprobs=np.zeros(2, np.float32),
                    policy_versions=(0, 0),
                    finish_reason="stop",
                    completion_text=f"{text} {row}",
                    verdict=verdict,
                )
            )
        groups.append(Group(task=Task(task_id=f"demo/{row}", prompt="", answer=f"gold {row}"), samples=tuple(samples)))
    return groups


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return RunRecord.open(tmp_path / "demo", {}, TOML, resume=False)


def write_eval(record: RunRecord, phase: Phase, right: tuple[int, ...], text: str) -> None:
    prompts = [f"Solve it. {100 + row * 111} + {row}\nAnswer:" for row in range(len(right))]
    record.write_samples(0, make_groups(right, text), phase, prompts)


def report_of(record: RunRecord) -> str:
    path = write_report(record.run_dir)
    assert path == record.run_dir / "report.html"
    return path.read_text()


def plain(page: str) -> str:
    """The page's text with markup and runs of whitespace taken out."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_a_finished_run_shows_its_numbers(record: RunRecord) -> None:
    for step in range(4):
        record.record(step_metrics(step))
    write_eval(record, "eval_before", (0, 2), "first try")
    write_eval(record, "eval_after", (4, 3), "second try")
    record.finish_samples()
    record.write_json("summary", SUMMARY)
    page = report_of(record)
    text = plain(page)
    assert "33.1% → 89.7%" in text
    assert "+56.6 points" in text
    assert "pass@16 at least one of 16 samples is right 84.2% 98.3% +14.1 points" in text
    assert "majority@16 the most frequent answer is right 52.2% 93.1% +40.9 points" in text
    assert "the answer at temperature 0 is right 61.0% 50.0% -11.0 points" in text
    assert "Learning: pass@16 grew &amp; more." in text
    assert "4 steps · 7 min 11 s · engine vllm · policy of 3.12M parameters, 1.31M active per token" in text
    assert "learning 1.20 60.0%" in text
    assert "sampling 0.50 25.0%" in text
    assert "base 1 min 15 s 75.0%" in text
    assert "1 of 4 steps were skipped, in whole or in part" in text
    assert "8 of 256 samples have no real verdict: the verifier failed." in text
    assert "gap is 0.200 nats" in text
    assert "group_size 8" in text
    assert "data.source generator" in text
    assert "seed 7" in text
    assert "Reward accuracy numeric x 1 format format x 0.2" in text
    assert "No values recorded" not in text
    assert "finished" in text
    assert page.count("<svg") == len(CHARTS) + 2


def test_completions_of_the_same_task_stand_side_by_side(record: RunRecord) -> None:
    write_eval(record, "eval_before", (0, 2, 3), "first try")
    write_eval(record, "eval_after", (4, 2, 1), "second try")
    text = plain(report_of(record))
    order = [text.index(f"demo/{row}") for row in (0, 1, 2)]
    assert order == sorted(order)
    assert "Before 0 of 4 samples right first try 0 wrong reason" in text
    assert "After 4 of 4 samples right second try 0 correct reason" in text
    assert "gold answer gold 1" in text
    assert "Solve it. 211 + 1 Answer:" in text


def test_the_text_around_the_problems_is_shown_once(record: RunRecord) -> None:
    write_eval(record, "eval_before", (1,) * 12, "first try")
    text = plain(report_of(record))
    assert text.count("Solve it.") == 1
    assert "Solve it. … Answer:" in text
    assert "demo/0 gold answer gold 0 100 + 0 Before" in text
    assert "After No sample yet." in text


def test_text_of_a_model_is_never_markup(record: RunRecord) -> None:
    evil = "<script>alert('x')</script><img src=x onerror=alert(1)> \x00"
    write_eval(record, "eval_before", (0,), evil)
    write_eval(record, "eval_after", (1,), evil)
    record.record(step_metrics(0) | {"reward_mean": None})
    record.write_json("summary", SUMMARY | {"learning_or_sharpening": "<script>2</script>", "engine": "<b>e</b>"})
    page = report_of(record)
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "<img" not in page
    assert "<i>correct" not in page
    assert "<b>e</b>" not in page
    assert "&lt;script&gt;2&lt;/script&gt;" in page


def test_nothing_is_loaded_from_outside(record: RunRecord) -> None:
    record.record(step_metrics(0))
    page = report_of(record)
    outside = re.findall(r"""(?:src|href)\s*=\s*["'](?!#)[^"']*|url\((?!#)[^)]*|@import[^;]*""", page)
    assert outside == []
    assert not re.search(r"<(?:link|script|iframe|image)\b", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


def test_a_partial_run_says_what_is_missing(record: RunRecord) -> None:
    record.write_json("eval_before", {"pass_at_1": 0.25, "pass_at_k": 0.75, "k": 8, "num_problems": 3})
    metrics = step_metrics(0)
    del metrics["kl"], metrics["logprob_gap_max"]
    record.record(metrics)
    with (record.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "rew')
    page = report_of(record)
    text = plain(page)
    assert "not finished" in text
    assert "steps recorded so far: 1" in text
    assert "No values recorded (kl)." in text
    assert "No values for: largest." in text
    assert "No held-out completions are recorded." in text
    assert "25.0% → not measured" in text
    assert "pass@8 at least one of 8 samples is right 75.0% not measured" in text
    assert page.count("<svg") == len(CHARTS) + 1


def test_a_run_that_has_only_begun(record: RunRecord) -> None:
    text = plain(report_of(record))
    assert "No step is recorded yet" in text
    assert "No times per step recorded." in text
    assert "No verdicts counted." in text


def test_a_summary_without_a_before(record: RunRecord) -> None:
    record.write_json("summary", {"pass_at_1_after": 0.5, "pass_at_1_before": None, "num_steps": 0})
    text = plain(report_of(record))
    assert "not measured 50.0%" in text
    assert "points" not in text.split("Curves")[0].replace("held-out", "")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.toml"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="missing is not a run folder"):
        write_report(tmp_path / "missing")
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is not JSON"):
        write_report(tmp_path)


def test_series_leaves_out_what_is_not_a_number_and_keeps_the_mean_of_long_runs() -> None:
    lines = [
        {"step": 0, "kl": 1.0},
        {"step": 1, "kl": None},
        {"step": 2},
        {"step": 3, "kl": math.nan},
        {"step": 4, "kl": 3},
    ]
    steps, values = series(lines, "kl")
    assert steps.tolist() == [0, 4]
    assert values.tolist() == [1.0, 3.0]
    steps, values = series([{"step": step, "kl": float(step)} for step in range(8000)], "kl")
    assert len(values) == MAX_POINTS
    assert values.mean() == pytest.approx(3999.5)
    assert steps.tolist() == values.tolist()


@pytest.mark.parametrize("value", [0.0, -1e-9, 5.0, 1e12])
def test_flat_single_and_extreme_curves_are_drawn(value: float) -> None:
    for chart in (CHARTS[0], CHARTS[1], CHARTS[6], TIME_CHART):
        for count in (1, 25):
            svg = draw([{"step": step} | {curve.key: value for curve in chart.curves} for step in range(count)], chart)
            assert svg is not None
            assert svg.startswith("<svg viewBox=")
            assert svg.endswith("</svg>")
            assert "#0101" not in svg
            assert "nan" not in svg.lower().split("<defs>")[0]
