"""Dense causal language models of transformers (Qwen2, Qwen3, Llama, Mistral, ...) as policies over packed tokens.

transformers holds the modules and the arithmetic of every layer but attention, which is ours (dense_attention.py).
Names in memory are those on disk and those that vLLM expects. transformers is imported where it is used: without it, the
other policies still work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from policy.atomic import CheckpointError
from policy.checkpoint_read import Target, config_values, load_weights, read_headers
from policy.config import PolicyConfigError
from policy.deepseek import Head, Packing, PolicyOutput
from policy.dense_attention import ATTENTION, Attend, Continuation, Documents, KeyValueCache, register_attention
from policy.dense_config import DenseConfig
from policy.layer_groups import layer_group


class DensePolicy(nn.Module):
    """A dense causal language model with the interface of `DeepseekPolicy`; its weights are arbitrary until loaded.

    Parameters are of type `dtype`; rotary frequencies are fp32, also after `.to(torch.bfloat16)`.
    """

    def __init__(self, config: DenseConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        causal_lm = _build(config, dtype)
        self.model: Any = causal_lm.model
        self.lm_head: nn.Linear = causal_lm.lm_head

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        *,
        head: Head | None = None,
        mtp: bool = False,
        routed_experts: Tensor | None = None,
        return_routed_experts: bool = False,
        return_balance_loss: bool = False,
    ) -> PolicyOutput:
        """Hidden states [T, D] of packed sequences, or head(hidden, lm_head.weight [V, D], 0) of them.

        ids [T], positions [T] from 0 in each, cumulative lengths [B + 1], as in `DeepseekPolicy.forward`; what only
        experts or prediction layers could answer is a ValueError.
        """
        self._refuse(
            mtp=mtp,
            routed_experts=routed_experts is not None,
            return_routed_experts=return_routed_experts,
            return_balance_loss=return_balance_loss,
        )
        if num_tokens := len(input_ids):
            documents = Documents(Packing.of(position_ids, cu_seqlens))
        else:  # transformers' layers can't shape nothing, and another rank may be waiting for this one's part
            input_ids, position_ids = input_ids.new_zeros(1), position_ids.new_zeros(1)
            documents = Documents(Packing.of(position_ids, torch.tensor([0, 1], device=cu_seqlens.device)))
        hidden = self._run(input_ids[None], position_ids[None], documents)[0][:num_tokens]
        return PolicyOutput(hidden if head is None else head(hidden, self.lm_head.weight, 0))

    def _refuse(self, **asked: bool) -> None:
        if impossible := [name for name, wanted in asked.items() if wanted]:
            raise ValueError(
                f"a dense {self.config.hf.model_type} has no experts and no multi-token prediction: "
                f"it can't serve {', '.join(impossible)}. Turn off what asks for it."
            )

    @property
    def moe_blocks(self) -> Mapping[int, Any]:
        """No layer has experts."""
        return {}

    @property
    def mtp_layers(self) -> list[Any]:
        """No layer predicts further tokens."""
        return []

    def new_cache(
        self, num_sequences: int, capacity: int, dtype: torch.dtype, device: torch.device, *, mtp: bool = False
    ) -> KeyValueCache:
        """An empty decoding cache for sequences of up to `capacity` tokens."""
        self._refuse(mtp=mtp)
        layers, heads, width = self.config.cache_shape
        keys = torch.zeros(layers, num_sequences, capacity, heads, width, dtype=dtype, device=device)
        return KeyValueCache(keys, torch.zeros_like(keys), torch.zeros(num_sequences, dtype=torch.long, device=device))

    def prefill(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        cache: KeyValueCache,
        experts: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states [T, D] of packed prompts, one per row of the cache, which takes them in."""
        self._refuse(experts=experts is not None)
        attend = Documents(Packing.of(position_ids, cu_seqlens), cache)
        hidden = self._run(input_ids[None], position_ids[None], attend)[0]
        cache.lengths = cu_seqlens.diff().to(cache.lengths.dtype)
        return hidden

    def decode(self, input_ids: Tensor, cache: KeyValueCache, experts: list[Tensor] | None = None) -> Tensor:
        """Hidden states [B, n, D] of n more tokens per sequence, written behind `cache.lengths`, which stay."""
        self._refuse(experts=experts is not None)
        position_ids = cache.lengths[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
        return self._run(input_ids, position_ids, Continuation(cache))

    def _run(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        output = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, attend=attend)
        return output.last_hidden_state

    def enable_activation_checkpointing(self, enabled: bool = True) -> None:
        """In training, keep only the input of each layer for backward, and compute the rest again."""
        if enabled:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def hf_state_dict(self) -> dict[str, Tensor]:
        """The weights under the checkpoint's names, as views; a tied head is the embedding and has no entry."""
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        return {name: weight for name, weight in self.state_dict().items() if name not in tied}

    def reset_parameters(self, seed: int) -> None:
        """Normal weights of standard deviation initializer_range from `seed`; norm gains 1, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        spread = getattr(self.config.hf, "initializer_range", 0.02)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" in name:
                    parameter.fill_(1.0)
                elif name.endswith("bias"):
                    parameter.zero_()
                else:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DensePolicy:
        # Frequencies rounded to half precision would move log-probabilities by 5e-4, for good.
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != before[name].dtype:
                buffer.data = before[name].to(buffer.device)
        if self.config.tie_word_embeddings:  # leaving the meta device makes two of what was one
            self.lm_head.weight = self.model.get_input_embeddings().weight
        return self

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Compute the rotary frequencies from the config again, after `to_empty` has left them arbitrary."""
        for name, module in self.model.named_modules():
            own = dict(module.named_buffers(recurse=False))
            if own and not name.endswith("rotary_emb"):
                raise PolicyConfigError(f"{name} has {', '.join(own)}: it can't be built on the meta device")
            if own:
                with torch.device("cpu"):
                    fresh = type(module)(self.model.config)
                for key, buffer in own.items():
                    buffer.copy_(fresh.get_buffer(key))

    @torch.no_grad()
    def check_against_transformers(self) -> None:
        """PolicyConfigError unless transformers' own forward, one document at a time, gives the same logits.

        It takes two forward passes of ten tokens, and finds architectures that mask, scale or project otherwise.
        """
        device = self.lm_head.weight.device
        documents = [torch.arange(1, length, device=device) % self.config.vocab_size for length in (7, 5)]
        lengths = torch.tensor([len(ids) for ids in documents], device=device)
        starts = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        positions = torch.cat([torch.arange(len(ids), device=device) for ids in documents])
        was_training = self.training
        self.eval()
        with _transformers_own(self) as causal_lm:
            theirs = torch.cat([causal_lm(ids[None], use_cache=False).logits[0] for ids in documents])
        ours = self.lm_head(self(torch.cat(documents), positions, starts).hidden)
        self.train(was_training)
        gap, spread = float((ours - theirs).float().abs().max()), float(theirs.float().std())
        if not gap <= (1e-3 if ours.dtype == torch.float32 else 0.1) * spread:
            raise PolicyConfigError(
                f"the packed forward of {self.config.values['architectures'][0]} differs from transformers' own by "
                f"{gap:.2g} in logits of standard deviation {spread:.2g}: this architecture is not a plain decoder"
            )


def load_dense(folder: Path, dtype: torch.dtype = torch.float32) -> DensePolicy:
    """The policy of a checkpoint folder, its weights read in place as `dtype`.

    CheckpointError lists weights that are missing, unknown or misshapen, or says what the config asks for in vain.
    """
    try:
        config = DenseConfig.from_hf_dict(config_values(folder))
        model = DensePolicy(config, dtype)
        targets = [Target(name, tuple(weight.shape), weight) for name, weight in model.hf_state_dict().items()]
        if config.tie_word_embeddings:  # some files repeat the embedding under this name
            head = model.lm_head.weight
            targets.append(Target("lm_head.weight", tuple(head.shape), head, alias=True))
        # Old files hold rotary frequencies, which follow from the config.
        frequencies = [name for name in read_headers(folder) if name.endswith("rotary_emb.inv_freq")]
        load_weights(folder, targets, frequencies)
        model.check_against_transformers()
    except PolicyConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return model


def _build(config: DenseConfig, dtype: torch.dtype) -> Any:
    """transformers' model with our attention and uninitialised weights, checked for the parts that are used here."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    register_attention()
    with no_init_weights():
        causal_lm: Any = AutoModelForCausalLM.from_config(
            copy.deepcopy(config.hf), dtype=dtype, attn_implementation=ATTENTION
        )
    name = type(causal_lm).__name__
    if not causal_lm._supports_attention_backend:
        raise PolicyConfigError(f"transformers' {name} has its attention written into it: it can't be packed")
    head = getattr(causal_lm, "lm_head", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or not hasattr(causal_lm, "model"):
        raise PolicyConfigError(
            f"{name} is not a `model` and an `lm_head` without bias: its logits can't be computed here"
        )
    if config.tie_word_embeddings:  # transformers ties when it initialises
        head.weight = causal_lm.get_input_embeddings().weight
    for parameter, _ in causal_lm.named_parameters():
        try:
            layer_group(parameter)
        except ValueError as error:
            raise PolicyConfigError(f"{name} is not a plain decoder: {error}") from error
    return causal_lm


@contextmanager
def _transformers_own(policy: DensePolicy) -> Iterator[Any]:
    """transformers' causal LM around the policy's modules, with transformers' plain attention."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        causal_lm: Any = AutoModelForCausalLM.from_config(copy.deepcopy(policy.config.hf))
    causal_lm.model, causal_lm.lm_head = policy.model, policy.lm_head
    policy.model.config._attn_implementation = "eager"
    try:
        yield causal_lm.train(policy.training)
    finally:
        policy.model.config._attn_implementation = ATTENTION
