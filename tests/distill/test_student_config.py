"""What a student's config refuses, in words that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill.student_config import DistillConfig
from rollout.toml_config import describe
from tests.distill.student_builders import LLAMA

GOOD: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "num_traces": 2,
    "student": {"init": "base"},
    "data": {"path": "traces.parquet", "max_tokens": 64},
    "trainer": {"lr": 1e-4},
}
HELD_OUT = {"data": {"source": "generator", "generator": "arithmetic"}}


def changed(**changes: Any) -> DistillConfig:
    tables = {key: GOOD.get(key, {}) | value if isinstance(value, dict) else value for key, value in changes.items()}
    return DistillConfig.model_validate(GOOD | tables)


def test_a_small_config_is_enough_and_every_field_is_described() -> None:
    assert changed().run_path == Path("runs/tiny-3")
    assert changed(run_dir="a/{seed}/{name}").run_path == Path("a/3/tiny")
    assert all(row.description for row in describe(DistillConfig))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"student": {"init": None}}, "exactly one of init, sft_config and model, not none"),
        ({"student": {"sft_config": "base.toml"}}, "not init and sft_config"),
        ({"student": {"init": None, "model": LLAMA}}, "tokenizer goes with model"),
        ({"student": {"tokenizer": "folder"}}, "tokenizer goes with model"),
        ({"student": {"init": None, "model": {"hidden": 3}, "tokenizer": "t"}}, "hidden"),
        ({"data": {"max_tokens": 9000}}, "max_tokens_per_microbatch=8192 must hold the longest trace"),
        ({"trainer": {"num_ranks": 2}}, "needs placement = 'ray'"),
        ({"trainer": {"placement": "ray", "num_ranks": 3, "expert_parallel": 2}}, "does not divide"),
        ({"trainer": {"lr_scale": {"heads": 1.0}}}, "not layer groups"),
        ({"trainer": {"lr": 0.0}}, "greater than 0"),
        ({"lora": {"rank": 4, "alpha": 8}, "trainer": {"dtype": "bfloat16"}}, "lora needs trainer.dtype"),
        ({"eval": HELD_OUT | {"max_completion_tokens": 512}}, "leaves no room for a prompt"),
        ({"eval": HELD_OUT | {"k": 9}}, "k=9 needs num_samples"),
        ({"checkpoint": {"keep_best": True}}, "keep_best needs eval.every_steps"),
        ({"template": "r1_zer"}, "did you mean 'r1_zero'"),
        ({"epochs": 3}, "Extra inputs"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(Exception, match=says):
        changed(**changes)
