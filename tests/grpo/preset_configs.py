"""The presets of configs/algorithms as whole configs, for tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from grpo.config import TrainConfig
from rollout.toml_config import load_config

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "algorithms"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.toml"))


@cache
def load_preset(preset: str) -> TrainConfig:
    """The preset on top of tiny_train.toml."""
    return load_config(TrainConfig, Path(__file__).parent / "tiny_train.toml", [f"extends={FOLDER / preset}.toml"])
