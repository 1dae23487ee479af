"""The engine's settings, and an engine built from them in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rollout.engine import Engine


class EngineConfig(BaseModel):
    """How to sample: which engine, how many of them, and how long each call may take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["vllm", "torch"] = Field(
        default="vllm", description="vllm, or torch: plain torch, needs neither vllm nor ray"
    )
    placement: Literal["ray", "in_process"] = Field(
        default="ray", description="ray: each engine is a Ray actor; in_process: one engine in the learner's process"
    )
    num_engines: int = Field(default=1, ge=1, description="engines that share the prompts")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="type of the engine's weights and cache"
    )
    max_model_len: int = Field(default=512, ge=2, description="most tokens of a prompt and its completion together")
    num_threads: int = Field(default=1, ge=1, description="CPU threads of each engine")
    kv_cache_gib: float = Field(default=1.0, gt=0, description="memory of vLLM's cache of keys and values, in GiB")
    max_num_seqs: int = Field(default=256, ge=1, description="sequences that an engine decodes at once")
    num_draft_tokens: int = Field(
        default=0,
        ge=0,
        description="tokens that multi-token prediction drafts ahead (kind=torch; at most num_nextn_predict_layers)",
    )
    return_routed_experts: bool = Field(
        default=False, description="keep the experts that each token went to, for routing replay (kind=torch)"
    )
    start_timeout_s: float = Field(default=180.0, gt=0, description="longest start of an engine, in seconds")
    generate_timeout_s: float = Field(default=600.0, gt=0, description="longest generate call, in seconds")
    sync_timeout_s: float = Field(default=60.0, gt=0, description="longest update of an engine's weights, in seconds")

    @model_validator(mode="after")
    def _one_engine_in_process(self) -> EngineConfig:
        if self.placement == "in_process" and self.num_engines != 1:
            raise ValueError(f"placement='in_process' holds one engine, not num_engines={self.num_engines}; use 'ray'")
        if self.placement == "in_process" and self.kind == "vllm":
            raise ValueError("kind='vllm' needs placement='ray': vLLM takes over the threads of the process it runs in")
        if self.kind == "vllm" and (self.num_draft_tokens or self.return_routed_experts):
            raise ValueError("num_draft_tokens and return_routed_experts need kind='torch'")
        return self


def build_engine(config: EngineConfig, checkpoint_dir: Path, *, name: str = "engine-0", seed: int = 0) -> Engine:
    """An engine in this process."""
    if config.kind == "torch":
        from rollout.torch_engine import TorchEngine

        return TorchEngine(
            checkpoint_dir,
            dtype=config.dtype,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            num_draft_tokens=config.num_draft_tokens,
            return_routed_experts=config.return_routed_experts,
            name=name,
        )
    from rollout.vllm_engine import VllmEngine

    return VllmEngine(
        checkpoint_dir,
        max_model_len=config.max_model_len,
        dtype=config.dtype,
        kv_cache_gib=config.kv_cache_gib,
        num_threads=config.num_threads,
        max_num_seqs=config.max_num_seqs,
        seed=seed,
        name=name,
    )
