"""An engine in plain torch: batched decoding with the policy's own layers, for any machine and without vLLM or Ray."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from policy.checkpoint import load_hf_state_dict, load_policy
from policy.interface import Policy
from rollout.decoding import Decoding
from rollout.engine import Completion, SamplingParams
from rollout.engine_checks import check_request


class TorchEngine:
    """Samples with the policy's cached decoding; a completion depends on its prompt, seed and the weights alone.

    `model_or_dir` is a checkpoint folder or a model, which is copied. Batch mates change a completion only through
    float noise. The cache of a DeepSeek policy holds kv_lora_rank + qk_rope_head_dim values per token and layer.
    `num_draft_tokens` are drafted by the policy's multi-token prediction, which changes the speed and nothing else;
    `return_routed_experts` leaves each completion with the experts that its tokens went to. Both are a ValueError for a
    policy without such layers.
    """

    def __init__(
        self,
        model_or_dir: Policy | str | Path,
        *,
        dtype: str = "float32",
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        device: str | torch.device | None = None,
        num_draft_tokens: int = 0,
        return_routed_experts: bool = False,
        name: str = "engine-0",
    ) -> None:
        self.name = name
        self.policy_version = 0
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = torch_dtype(dtype)
        given = isinstance(model_or_dir, nn.Module)
        self.model: Policy = copy.deepcopy(model_or_dir) if given else load_policy(Path(model_or_dir))
        self.num_draft_tokens = num_draft_tokens
        self.return_routed_experts = return_routed_experts
        self._check_options()
        self.model.to(self.device).eval().requires_grad_(False)
        # Parameters only: the routing bias moves in steps too small for half precision.
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(self.dtype)
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len or self.model.config.max_position_embeddings

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per prompt, in order; log-probabilities are those of `rollout.decoding.sample_tokens`."""
        check_request(prompts, params, seeds, self.max_model_len)
        completions: list[Completion] = []
        for start in range(0, len(prompts), self.max_num_seqs):
            wave = slice(start, start + self.max_num_seqs)
            decoding = Decoding(
                self.model,
                prompts[wave],
                params,
                seeds[wave],
                dtype=self.dtype,
                device=self.device,
                num_draft_tokens=self.num_draft_tokens,
                return_routed_experts=self.return_routed_experts,
            )
            completions += decoding.run(self.policy_version)
        return completions

    def _check_options(self) -> None:
        depth = getattr(self.model.config, "num_nextn_predict_layers", 0)
        if not 0 <= self.num_draft_tokens <= depth:
            raise ValueError(
                f"num_draft_tokens={self.num_draft_tokens}, but the policy of {self.name} has {depth} layers of "
                "multi-token prediction (num_nextn_predict_layers), one for each token that can be drafted"
            )
        if self.return_routed_experts and not getattr(self.model.config, "num_moe_layers", 0):
            raise ValueError(f"return_routed_experts is set, but the policy of {self.name} has no routed experts")

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Replace all weights and take `version`; CheckpointError lists names or shapes that don't fit."""
        load_hf_state_dict(self.model, weights, f"the update of {self.name} to version {version}")
        self.policy_version = version

    def close(self) -> None:
        """Nothing to free: the model goes with the engine."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of "float32", "bfloat16" or "float16"; ValueError for another name."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(known)}")
    return known[name]
