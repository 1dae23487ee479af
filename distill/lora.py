"""Low-rank adapters (LoRA, arXiv 2106.09685) on a dense student, by the package peft, which is imported only when asked for."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from policy.dense import DensePolicy
from policy.interface import Policy
from rollout.errors import UserError

ADAPTER = "adapter"  # folder beside the merged weights of a checkpoint
_NAME = "default"


class LoraConfig(BaseModel):
    """Which linear layers get an adapter, and how large it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(ge=1, description="rank r of each adapter")
    alpha: float = Field(gt=0, description="the adapter's product is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the adapter's input")
    rank_stabilised: bool = Field(default=False, description="scale by alpha / sqrt(rank) (arXiv 2312.03732)")
    target_modules: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="last names of the linear layers with an adapter",
    )


def check_peft() -> None:
    """UserError where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            f"[lora] needs the package peft, which is not installed. Install it with\n  {sys.executable} -m pip install peft\n"
            "or take [lora] out of the config."
        )


def add_adapters(model: Policy, config: LoraConfig, seed: int) -> None:
    """Freeze the student and put adapters, which change nothing at first, on its linear layers; in place.

    A student with experts, and a target that none of its layers has, are a UserError.
    """
    check_peft()
    import peft

    if not isinstance(model, DensePolicy):
        raise UserError(
            "[lora] is for dense students: the experts of a DeepSeek policy are no linear layers. Take it out."
        )
    linear = {name.rpartition(".")[2] for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    if unknown := sorted(set(config.target_modules) - linear):
        raise UserError(f"lora.target_modules names {', '.join(unknown)}; the student has {', '.join(sorted(linear))}")
    options = _options(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(options, model, adapter_name=_NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def has_adapters(model: Policy) -> bool:
    """Whether the student's linear layers have adapters."""
    return any(True for _ in _adapted(model))


def adapter_state(model: Policy) -> dict[str, Tensor]:
    """The adapters' own weights by name, as views."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


@torch.no_grad()
def load_adapter_state(model: Policy, state: dict[str, Tensor]) -> None:
    """Take up the weights of `adapter_state`; UserError where they are those of other adapters."""
    own = adapter_state(model)
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in state.items()}:
        raise UserError(
            "the checkpoint's adapters are not those of this config: set [lora] as it was, or begin a new run"
        )
    for name, parameter in own.items():
        parameter.copy_(state[name])


@torch.no_grad()
def merged_weights(model: DensePolicy) -> dict[str, Tensor]:
    """The student's weights under the released names, each adapter added to its layer's; new tensors where it was."""
    stored = {}
    for name, weight in model.hf_state_dict().items():
        if ".lora_" not in name:
            stored[name.replace(".base_layer.", ".")] = weight
    for name, layer in _adapted(model):
        weight = layer.base_layer.weight
        stored[f"{name}.weight"] = weight + layer.get_delta_weight(_NAME).to(weight.dtype)
    return stored


def write_adapter(folder: Path, state: dict[str, Tensor], config: LoraConfig, base: str) -> None:
    """Write adapters as peft's own files, which `PeftModel.from_pretrained` puts on the model `base`."""
    from safetensors.torch import save_file

    folder.mkdir()
    named = {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": value.detach().cpu().contiguous()
        for name, value in state.items()
    }
    save_file(named, folder / "adapter_model.safetensors")
    values = _options(config).to_dict() | {"base_model_name_or_path": base}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    (folder / "adapter_config.json").write_text(json.dumps(plain, indent=2, default=str) + "\n")


def _options(config: LoraConfig) -> Any:
    import peft

    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        use_rslora=config.rank_stabilised,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
        bias="none",
    )


def _adapted(model: Policy) -> Iterator[tuple[str, Any]]:
    """Name and layer of every linear layer with an adapter."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))
