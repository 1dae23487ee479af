"""What the step benchmark computes from its runs, and that its job is a config both sides can run."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from grpo.config import TrainConfig
from scripts.bench_step import (
    STAGES,
    BenchError,
    Job,
    Result,
    check_trl,
    comparison_table,
    curves_table,
    digit_share,
    end_reward,
    medians,
    prompts,
    sweep_jobs,
    sweep_table,
    train_config,
    verdict,
    watched,
)

ROOT = Path(__file__).resolve().parents[2]


def result(totals: list[float], rewards: list[float], peak_mib: int = 100) -> Result:
    rest = dict.fromkeys(STAGES, 0.0) | {"completion_tokens": 50.0}
    steps = [rest | {"total": t, "sampling": t / 2, "reward": r} for t, r in zip(totals, rewards, strict=True)]
    return Result(steps, peak_mib * 2**20, peak_mib * 2**20, sum(totals) + 7)


def cells(table: str, row: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(("text", "share"), [("12ab", 0.5), ("", 0.0), ("7", 1.0), ("a\ufffd1\n", 0.25)])
def test_the_reward_is_the_share_of_digits(text: str, share: float):
    assert digit_share(text, None) == share


def test_times_are_medians_after_the_warm_up_of_all_seeds():
    runs = [result([90, 1, 2], [0, 0, 0]), result([80, 3, 9], [0, 0, 0])]
    assert medians(runs, 1)["total"] == 2.5
    assert medians(runs, 1)["sampling"] == 1.25


def test_the_ratio_is_peer_over_ours_and_memory_the_largest():
    results = {"TRL": [result([9, 4, 4], [0, 0, 0])], "ours": [result([9, 1, 1], [0, 0, 0], m) for m in (200, 300)]}
    table = comparison_table(results, 1)
    assert cells(table, "ours")[-1] == "4.00"
    assert cells(table, "TRL")[-1] == "1.00"
    assert cells(table, "ours")[-4:-2] == ["300", "300"]
    assert cells(table, "ours")[-2] == "7"
    assert cells(comparison_table({"ours": results["ours"]}, 1), "ours")[-1] == ""


def test_curves_are_compared_in_standard_errors_over_seeds():
    ours = [result([1] * 4, [0, 0, 0, end]) for end in (0.4, 0.6)]
    theirs = [result([1] * 4, [0, 0, 0, end]) for end in (0.5, 0.7)]
    mean, error = end_reward(ours, 1)
    assert (mean, error) == (pytest.approx(0.5), pytest.approx(0.1))
    said = verdict({"TRL": theirs, "ours": ours})
    assert "-0.100 against TRL, 0.7 standard errors" in said
    assert cells(curves_table({"ours": ours}), "ours")[1:] == ["0.000", "0.000", "0.000", "0.500", "0.500", "0.100"]
    assert "one seed only" in verdict({"TRL": theirs[:1], "ours": ours[:1]})


@pytest.mark.parametrize("job", [Job("torch"), Job("vllm"), *sweep_jobs(Job("torch"), ["torch", "vllm"])])
def test_every_job_is_a_valid_config(job: Job, tmp_path: Path):
    config = TrainConfig.model_validate(train_config(job, tmp_path, tmp_path))
    assert config.num_prompts * config.group_size == job.num_prompts * job.group_size
    assert config.engine.max_model_len == 32 + job.max_completion_tokens


def test_the_sweep_changes_one_thing_at_a_time():
    base = Job("torch", num_steps=3)
    changed = [
        (j.group_size != 8) + (j.max_completion_tokens != 64) + (j.num_engines != 1)
        for j in sweep_jobs(base, ["torch"])
    ]
    assert changed == [0, 1, 1, 1, 1, 1, 1, 1]
    table = sweep_table([base], lambda job: result([5, 2, 2], [0, 0, 0]), 1)
    assert cells(table, base.name)[3:5] == ["6,400", "2.00"]
    assert cells(table, base.name)[-2] == "312"


def test_prompts_of_a_step_are_those_of_the_run_and_fit():
    two, one = prompts(3, 2, 4), prompts(3, 1, 4)
    assert two[:4] == one
    assert len(set(two)) == 8


def test_a_watched_process_has_its_peak_measured(tmp_path: Path):
    code = "import time; x = bytearray(b'1') * (200 * 2**20); time.sleep(1.5)"
    peak, main_peak, wall_s = watched([sys.executable, "-c", code], tmp_path / "log", "it")
    assert 200 * 2**20 < main_peak < 300 * 2**20
    assert 200 * 2**20 < peak < 300 * 2**20
    assert wall_s > 1.5


def test_a_failed_process_is_named_with_the_end_of_its_log(tmp_path: Path):
    with pytest.raises(BenchError, match=r"TRL ended with status 3:\nwhat went wrong"):
        watched([sys.executable, "-c", "print('what went wrong'); exit(3)"], tmp_path / "log", "TRL")


@pytest.mark.skipif(find_spec("trl") is not None, reason="TRL is installed here")
def test_a_missing_peer_says_how_to_install_it():
    with pytest.raises(BenchError, match=r"requirements/bench\.txt"):
        check_trl(sys.executable)


def test_the_peer_is_pinned():
    lines = (ROOT / "requirements/bench.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["trl==1.16.0"]


def test_peer_options_are_the_job(tmp_path: Path):
    pytest.importorskip("trl")
    import dataclasses

    from scripts.bench_step import LOSS, OPTIMIZER
    from scripts.bench_step_trl import grpo_config

    options = grpo_config({**dataclasses.asdict(Job("trl")), **LOSS, **OPTIMIZER, "folder": str(tmp_path)})
    assert options.generation_batch_size == 16 * 8
    assert (options.beta, options.epsilon, options.epsilon_high) == (0.001, 0.2, 0.28)
    assert options.learning_rate == 2e-3
