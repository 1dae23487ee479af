"""Choices that contradict each other are refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo.config import TrainConfig
from rollout.errors import UserError
from rollout.toml_config import load_config

TINY = Path(__file__).parent / "tiny_train.toml"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["algorithm.kl_placement=reward", "algorithm.advantage_per_reward=true"],
            "advantage_per_reward does not look at",
        ),
        (["num_steps=19", "checkpoint.every_steps=20", "checkpoint.keep_best=true"], "keep_best needs a measurement"),
        (
            ["sampling.max_completion_tokens=16", "sampling.length_schedule=[{from_step=2, max_completion_tokens=8}]"],
            "length_schedule must grow",
        ),
    ],
)
def test_refuses(overrides: list[str], words: str) -> None:
    assert load_config(TrainConfig, TINY).num_steps  # without them it is a config
    with pytest.raises(UserError, match=words):
        load_config(TrainConfig, TINY, overrides)
