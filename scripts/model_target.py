"""From what a person names, a file, a folder or a model, to the config that it stands for."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policy.config import PolicyConfig, PolicyConfigError
from rollout.errors import UserError

if TYPE_CHECKING:
    from policy.dense_config import DenseConfig

NAMED = Path(__file__).resolve().parents[1] / "configs" / "models"


def find_config(target: str | Path) -> tuple[str, PolicyConfig | DenseConfig]:
    """A target as it is to be shown, and its config: TOML file, config.json, checkpoint folder, or a name in configs/models."""
    path = Path(target)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not a checkpoint: it has no config.json")
        path = path / "config.json"
    elif not path.exists():
        path = _named(str(target))
    try:
        shown = str(target) if path.parent == NAMED else str(path)
        if path.suffix == ".toml":
            return _from_toml(path, shown)
        return shown, config_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # damaged text, JSON or TOML, or a PolicyConfigError
        raise UserError(f"{path}: {error}") from error


def _named(name: str) -> Path:
    known = sorted(file.stem for file in NAMED.glob("*.toml"))
    wanted = name.lower().replace("-", "_")
    if wanted in known:
        return NAMED / f"{wanted}.toml"
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the named models are {', '.join(known)}"
    raise UserError(f"{name}: there is no such file, checkpoint folder or named model; {hint}")


def config_from_json(values: Any) -> PolicyConfig | DenseConfig:
    """The config in a config.json: DeepSeek's architecture, or a dense causal language model."""
    if not isinstance(values, dict):
        raise PolicyConfigError("this holds no JSON object, so it is no config.json")
    if str(values.get("model_type")).startswith("deepseek_v"):
        return PolicyConfig.from_hf_dict(values)
    from policy.dense_config import DenseConfig

    return DenseConfig.from_hf_dict(values)


def _from_toml(path: Path, shown: str) -> tuple[str, PolicyConfig | DenseConfig]:
    """A model's shape, or the model that a training config starts from."""
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    if "policy" in values:
        from grpo.config import TrainConfig
        from rollout.toml_config import load_config

        policy = load_config(TrainConfig, path).policy
        source = policy.path or policy.sft_config
        assert source is not None  # TrainConfig wants one of them
        return _following(path, source)
    if "data" in values:
        from distill.sft import SftConfig
        from rollout.toml_config import load_config

        sft = load_config(SftConfig, path)
        if sft.init is not None:
            return _following(path, sft.init)
        assert sft.model is not None  # SftConfig wants one of them
        return shown, _from_shape({"vocab_size": sft.vocab_size, **sft.model})
    return shown, _from_shape(values.get("model", values))


def _following(path: Path, source: Path) -> tuple[str, PolicyConfig | DenseConfig]:
    shown, config = find_config(source)
    return f"{path} -> {shown}", config


def _from_shape(values: Mapping[str, Any]) -> PolicyConfig | DenseConfig:
    """PolicyConfig's fields, or those of a config.json, which names its model_type."""
    if "model_type" in values:
        return config_from_json(dict(values))
    try:
        return PolicyConfig(**values)
    except TypeError as error:
        reason = str(error).partition("()")[2].strip() or str(error)
        raise PolicyConfigError(f"not the shape of a model: {reason}") from error
