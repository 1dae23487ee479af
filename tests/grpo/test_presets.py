"""The presets in configs/algorithms: they load, say what was published, and give a source for every value."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from grpo.config import TrainConfig
from rollout.records import Task
from rollout.toml_config import load_config, to_toml
from tests.grpo.preset_configs import FOLDER, PRESETS, ROOT, load_preset
from verifiers import resolve

DECIDED_BY_ALL = {
    "advantage_baseline", "advantage_std", "zero_variance_groups", "ratio_level", "surrogate", "aggregation",
    "mask_truncated", "kl_coef", "reference_refresh_steps", "entropy_coef",
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "r1_zero": {
        "num_steps": 10_400 // 16,
        "num_prompts": 8192 // 16,
        "group_size": 16,
        "template": "r1_zero",
        "sampling.temperature": 1.0,
        "sampling.max_completion_tokens": 32_768,
        "algorithm.advantage_std": "group",
        "algorithm.kl_coef": 0.001,
        "algorithm.kl_estimator": "k3",
        "algorithm.kl_placement": "loss",
        "algorithm.reference_refresh_steps": 400 // 16,
        "learner.lr": 3e-6,
        "learner.num_minibatches": 16,
        "learner.num_epochs": 1,
    },
    "r1": {
        "num_prompts": 512,
        "group_size": 16,
        "sampling.temperature": 1.0,
        "sampling.max_completion_tokens": 32_768,
        "algorithm.clip_low": 10.0,
        "algorithm.clip_high": 10.0,
        "algorithm.kl_coef": 0.001,
        "algorithm.reference_refresh_steps": 25,
        "learner.lr": 3e-6,
        "learner.num_minibatches": 16,
    },
    "deepseek_math_grpo": {
        "num_prompts": 1024 // 64,
        "group_size": 64,
        "sampling.max_completion_tokens": 1024,
        "algorithm.advantage_std": "group",
        "algorithm.aggregation": "sequence_mean",
        "algorithm.kl_coef": 0.04,
        "algorithm.kl_estimator": "k3",
        "algorithm.kl_placement": "loss",
        "learner.lr": 1e-6,
        "learner.num_minibatches": 1,
        "learner.num_epochs": 1,
    },
    "deepseek_v3_2": {
        "algorithm.advantage_std": "none",
        "algorithm.kl_estimator": "k3",
        "algorithm.kl_importance_weighted": True,
        "algorithm.routing_replay": True,
        "algorithm.sampling_mask_replay": True,
        "engine.return_routed_experts": True,
    },
    "dapo": {
        "num_prompts": 512,
        "group_size": 16,
        "sampling.max_completion_tokens": 16_384 + 4096,
        "algorithm.clip_low": 0.2,
        "algorithm.clip_high": 0.28,
        "algorithm.aggregation": "token_mean",
        "algorithm.zero_variance_groups": "resample",
        "algorithm.mask_truncated": True,
        "algorithm.kl_coef": 0.0,
        "learner.lr": 1e-6,
        "learner.warmup_steps": 20 * 16,
        "learner.num_minibatches": 16,
    },
    "dr_grpo": {
        "group_size": 8,
        "sampling.max_completion_tokens": 3000,
        "algorithm.advantage_std": "none",
        "algorithm.aggregation": "constant",
        "algorithm.constant_length": 3000,
        "algorithm.clip_low": 0.2,
        "algorithm.clip_high": 0.2,
        "algorithm.kl_coef": 0.0,
        "learner.lr": 1e-6,
        "learner.betas": (0.9, 0.95),
        "learner.weight_decay": 0.0,
        "learner.max_grad_norm": 1.0,
    },
    "gspo": {
        "algorithm.ratio_level": "sequence",
        "algorithm.clip_low": 3e-4,
        "algorithm.clip_high": 4e-4,
        "algorithm.aggregation": "sequence_mean",
        "learner.num_minibatches": 4,
    },
    "cispo": {
        "algorithm.surrogate": "cispo",
        "algorithm.cispo_ratio_min": 0.0,
        "algorithm.aggregation": "token_mean",
        "algorithm.kl_coef": 0.0,
        "algorithm.zero_variance_groups": "resample",
        "learner.betas": (0.9, 0.95),
        "learner.num_minibatches": 16,
    },
    "rloo": {
        "algorithm.advantage_baseline": "leave_one_out",
        "algorithm.advantage_std": "none",
        "algorithm.ratio_level": "none",
        "algorithm.aggregation": "sequence_sum",
        "algorithm.kl_coef": 0.03,
        "algorithm.kl_placement": "reward",
        "algorithm.kl_estimator": "k1",
        "learner.lr": 1e-6,
    },
}


def leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def value_at(config: TrainConfig, place: str) -> Any:
    node: Any = config
    for part in place.split("."):
        node = getattr(node, part)
    return node


def value_lines(preset: str) -> list[tuple[str, str]]:
    """Key and comment of every line that sets a value."""
    lines = [line for line in (FOLDER / f"{preset}.toml").read_text().splitlines() if re.match(r"[\w.]+ =", line)]
    return [(line.partition(" =")[0], line.partition("# ")[2]) for line in lines]


def test_there_is_a_preset_for_each_and_no_other() -> None:
    assert set(PRESETS) == PUBLISHED.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_loads_over_a_complete_config_and_every_value_arrives(tmp_path: Path, preset: str) -> None:
    config = load_preset(preset)
    stated = dict(leaves(tomllib.loads((FOLDER / f"{preset}.toml").read_text())))
    dumped = dict(leaves(config.model_dump(mode="json", exclude_unset=True)))
    assert {place: dumped[place] for place in stated} == stated
    assert config.name == "tiny"
    assert config.algorithm.sapo_temperature_positive == 2.0
    (tmp_path / "resolved.toml").write_text(to_toml(config))
    assert load_config(TrainConfig, tmp_path / "resolved.toml") == config


@pytest.mark.parametrize("preset", PRESETS)
def test_says_what_was_published(preset: str) -> None:
    config = load_preset(preset)
    assert {place: value_at(config, place) for place in PUBLISHED[preset]} == PUBLISHED[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_leaves_no_choice_that_makes_the_algorithm_to_the_file_below(preset: str) -> None:
    algorithm = tomllib.loads((FOLDER / f"{preset}.toml").read_text())["algorithm"]
    needed = set(DECIDED_BY_ALL)
    if algorithm["advantage_std"] != "none":
        needed |= {"advantage_ddof", "advantage_eps"}
    if algorithm["surrogate"] == "clip" and algorithm["ratio_level"] != "none":
        needed |= {"clip_low", "clip_high"}
    if algorithm["kl_coef"]:
        needed |= {"kl_estimator", "kl_placement", "kl_importance_weighted"}
    assert needed <= algorithm.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_value_has_a_source_or_is_called_not_stated(preset: str) -> None:
    text = (FOLDER / f"{preset}.toml").read_text()
    header = " ".join(line for line in text.partition("\n[")[0].splitlines() if line.startswith("#"))
    declared = set(re.findall(r"\[([\w.]+)\](?= (?:arXiv|its|the authors))", header))
    assert declared
    lines = value_lines(preset)
    flat = [place for place, _ in leaves(tomllib.loads(text))]
    assert len(lines) >= len(flat)  # a table of the list `rewards` counts once there
    for key, comment in lines:
        tags = set(re.findall(r"\[([A-Za-z][\w.]*)\]", comment))
        assert tags <= declared, f"{key}: {tags - declared} is not explained at the top"
        assert tags or "not stated" in comment or comment.startswith("here: "), f"{key}: no source in {comment!r}"


@pytest.mark.parametrize("preset", PRESETS)
def test_docs_name_each_preset_and_what_is_not_stated(preset: str) -> None:
    rows = (ROOT / "docs" / "presets.md").read_text().splitlines()
    cells = next(row.split("|") for row in rows if row.startswith(f"| `{preset}` "))
    assert re.findall(r"`([\w.]+)`", cells[4]) == [
        key for key, comment in value_lines(preset) if "not stated" in comment
    ]


def test_docs_show_no_other_preset() -> None:
    text = (ROOT / "docs" / "presets.md").read_text()
    assert re.findall(r"^\| `(\w+)` ", text, re.MULTILINE) == list(PUBLISHED)
    assert all((ROOT / path).is_file() for path in re.findall(r"configs/[\w/]+\.toml", text))


def test_r1_zero_rewards_and_lengths() -> None:
    config = load_preset("r1_zero")
    assert [(r.name, r.weight) for r in config.rewards] == [("accuracy", 1.0), ("format", 1.0)]
    optimizer_step = 8200
    assert config.sampling.max_tokens_at(0) == 32_768
    assert config.sampling.max_tokens_at(optimizer_step // 16 - 1) == 32_768
    assert config.sampling.max_tokens_at(optimizer_step // 16) == 65_536


def test_r1_adds_the_language_reward_to_those_of_r1_zero() -> None:
    rewards = load_preset("r1").rewards
    assert rewards[:2] == load_preset("r1_zero").rewards
    assert [(r.verifier, r.weight) for r in rewards[2:]] == [("language", 1.0)]


def test_dapo_punishes_length_as_published() -> None:
    accuracy, overlong = load_preset("dapo").rewards
    assert accuracy.weight == 2.0  # the distance of right (1) and wrong (-1)
    verifier = resolve(overlong.verifier, overlong.options)
    scores = {}
    for length in (16_384, 18_432, 20_480, 20_481):
        task = Task(task_id="t", prompt="p", answer=None, metadata={"num_tokens": length})
        scores[length] = overlong.weight * verifier("x", task).score
    assert scores == {16_384: 0.0, 18_432: -0.5, 20_480: -1.0, 20_481: -1.0}


def test_every_reward_of_a_preset_is_a_verifier_with_those_options() -> None:
    for preset in PRESETS:
        for reward in load_preset(preset).rewards:
            resolve(reward.verifier, reward.options)


@pytest.mark.parametrize("preset", ["gspo", "cispo"])
def test_a_preset_turns_the_quickstart_into_another_algorithm(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plain = load_config(TrainConfig, Path("configs/quickstart.toml"))
    changed = load_config(TrainConfig, Path("configs/quickstart.toml"), [f"extends=configs/algorithms/{preset}.toml"])
    assert {place: value_at(changed, place) for place in PUBLISHED[preset]} == PUBLISHED[preset]
    assert changed.sampling == plain.sampling
    assert changed.rewards == plain.rewards
    assert changed.engine == plain.engine


def test_the_config_shown_in_the_docs_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "presets.md").read_text().partition("```toml\n")[2].partition("```")[0]
    (tmp_path / "mine.toml").write_text(text)
    monkeypatch.chdir(ROOT / "configs")
    config = load_config(TrainConfig, tmp_path / "mine.toml")
    assert (config.num_prompts, config.group_size, config.algorithm.clip_high) == (64, 16, 0.28)
