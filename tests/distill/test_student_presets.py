"""The presets in configs/distill: they load, say what was published, and give a source for every value."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import tomli_w

from distill.student_config import DistillConfig
from rollout.toml_config import load_config, to_toml

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "distill"
COMMON = "r1_students"
# DeepSeek-R1 (arXiv 2501.12948, revised), B.4.3: initial learning rates.
RATES = {
    "qwen2.5_math_1.5b": 1e-4,
    "qwen2.5_math_7b": 8e-5,
    "qwen2.5_14b": 7e-5,
    "qwen2.5_32b": 6e-5,
    "llama3.1_8b": 5e-5,
    "llama3.3_70b_instruct": 2e-5,
}


def load_preset(tmp_path: Path, name: str) -> DistillConfig:
    own = {"extends": str(FOLDER / f"{name}.toml"), "name": "mine", "student": {"init": "base"}, "data": {"path": "t"}}
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(own))
    return load_config(DistillConfig, tmp_path / "mine.toml")


def test_every_preset_that_builds_on_the_common_part_is_one_of_the_published_students() -> None:
    building = {path.stem for path in FOLDER.glob("*.toml") if f'"{COMMON}.toml"' in path.read_text()}
    assert building == RATES.keys()


@pytest.mark.parametrize("name", RATES)
def test_says_what_was_published(tmp_path: Path, name: str) -> None:
    config = load_preset(tmp_path, name)
    assert config.trainer.lr == RATES[name]
    assert config.trainer.final_lr_share == 0.1
    assert config.num_traces == 64
    assert config.num_epochs in (2, 3)
    assert config.data.max_tokens == 32_768
    (tmp_path / "resolved.toml").write_text(to_toml(config))
    assert load_config(DistillConfig, tmp_path / "resolved.toml") == config


@pytest.mark.parametrize("name", [*RATES, COMMON])
def test_every_value_has_a_source_or_is_called_not_stated(name: str) -> None:
    text = (FOLDER / f"{name}.toml").read_text()
    lines = [line for line in text.splitlines() if re.match(r"\w+ =", line) and not line.startswith("extends")]
    tables = [table for key, table in tomllib.loads(text).items() if key != "extends"]
    assert len(lines) == sum(len(table) if isinstance(table, dict) else 1 for table in tables)
    for line in lines:
        comment = line.rpartition("# ")[2]
        assert "[R1v2] B.4.3" in comment or comment.startswith("not stated; "), line
    assert "[R1v2] arXiv 2501.12948" in text
