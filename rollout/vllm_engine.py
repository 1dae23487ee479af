"""The vLLM engine, in this process: sampling with vLLM's kernels, and weights replaced in place."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rollout.engine import Completion, SamplingParams
from rollout.engine_checks import check_request, check_weights
from rollout.records import SamplingMask

if TYPE_CHECKING:
    from torch import Tensor

# vLLM keeps every token as likely as the k-th: so many log-probabilities beyond top_k are asked for, to see them too.
ROOM_FOR_TIES = 16
# Probability that a sampling mask may miss: the log-probabilities under the mask are off by as much, in nats.
MASS_TOLERANCE = 1e-3


class VllmEngine:
    """Samples with vLLM 0.32 from a Hugging Face checkpoint folder; ValueError for weights or prompts that don't fit.

    Starting it sets environment variables and, on the CPU, replaces `torch.set_num_threads` and turns torch.compile
    off in this process: in a program that also trains, run it in a process of its own (`rollout.cluster`).
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        *,
        max_model_len: int,
        dtype: str = "float32",
        kv_cache_gib: float = 1,
        num_threads: int = 1,
        max_num_seqs: int = 256,
        seed: int = 0,
        name: str = "engine-0",
    ) -> None:
        self.name = name
        self.policy_version = 0
        self.max_model_len = max_model_len
        self._config = read_values(Path(checkpoint_dir))
        self._shapes = checkpoint_shapes(Path(checkpoint_dir))
        _set_environment(num_threads)
        import torch
        from vllm import LLM
        from vllm.platforms import current_platform

        torch.set_num_threads(num_threads)
        on_cpu = current_platform.is_cpu()
        self._llm: Any = LLM(
            model=str(checkpoint_dir),
            skip_tokenizer_init=True,
            dtype=dtype,  # type: ignore[arg-type]
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            kv_cache_memory_bytes=int(kv_cache_gib * 2**30),
            seed=seed,
            enforce_eager=on_cpu,
            # Cached keys and values would outlive the weights that made them.
            enable_prefix_caching=False,
            logprobs_mode="processed_logprobs",
            max_logprobs=-1,  # sampling masks need top_k of them
            generation_config="vllm",
            worker_extension_cls="rollout.vllm_worker.WeightUpdateExtension",
            **(_cpu_settings(self._config) if on_cpu else {}),
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per prompt, in order; log-probabilities are after temperature, top-k, top-p (raw when greedy).

        A sampling mask needs top_k above 0 where tokens are cut off, a ValueError otherwise.
        """
        from vllm import SamplingParams as VllmSamplingParams

        check_request(prompts, params, seeds, self.max_model_len)
        masked = params.return_sampling_mask and params.cuts_off
        if masked and not params.top_k:
            raise ValueError(
                "vLLM reports what sampling kept only up to a number of tokens: with return_sampling_mask set top_k "
                f"beside top_p={params.top_p}, or use the torch engine"
            )
        if not prompts:
            return []
        vllm_params = [
            VllmSamplingParams(
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                max_tokens=params.max_completion_tokens,
                stop_token_ids=list(params.stop_token_ids),
                # Only the stop tokens named above end a completion, whatever the checkpoint's config says.
                ignore_eos=True,
                logprobs=min(params.top_k + ROOM_FOR_TIES, self._config["vocab_size"]) if masked else 0,
                flat_logprobs=True,
                detokenize=False,
                seed=seed,
            )
            for seed in seeds
        ]
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._llm.generate(requests, vllm_params, use_tqdm=False)  # type: ignore[arg-type]
        return [self._completion(output.outputs[0], params) for output in outputs]

    def _completion(self, output: Any, params: SamplingParams) -> Completion:
        token_ids, flat = list(output.token_ids), output.logprobs
        logprobs = [flat.logprobs[start] for start in flat.start_indices]  # the sampled token's come first
        if len(logprobs) != len(token_ids):
            raise RuntimeError(f"vLLM returned {len(logprobs)} log-probabilities for {len(token_ids)} tokens")
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a completion with finish_reason {output.finish_reason!r}")
        return Completion(
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=output.finish_reason,
            policy_version=self.policy_version,
            sampling_mask=_sampling_mask(flat, params) if params.return_sampling_mask else None,
        )

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Replace all weights and take `version`; ValueError lists names or shapes unlike the checkpoint's."""
        used = {name: weight for name, weight in weights.items() if sampling_uses(name, self._config)}
        check_weights({name: tuple(weight.shape) for name, weight in used.items()}, self._shapes)
        self._llm.collective_rpc("replace_weights", args=(list(used.items()),))
        self.policy_version = version

    def close(self) -> None:
        """Drop the model and its cache."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None


def _sampling_mask(flat: Any, params: SamplingParams) -> SamplingMask:
    """What sampling kept, from vLLM's processed log-probabilities: finite ones, those of the sampled token twice."""
    starts, ends = np.asarray(flat.start_indices, np.int64), np.asarray(flat.end_indices, np.int64)
    if not params.cuts_off:
        return SamplingMask(np.zeros(len(starts) + 1, np.int64), np.empty(0, np.int32))
    logprobs = np.asarray(flat.logprobs, np.float64)
    places = np.repeat(np.arange(len(starts)), ends - starts)
    # One number for place and id, whose order is that of places, then of ids.
    keys = (places << 32) | np.asarray(flat.token_ids, np.int64)
    finite = np.isfinite(logprobs)
    keys, first = np.unique(keys[finite], return_index=True)
    places = keys >> 32
    mass = np.bincount(places, np.exp(logprobs[finite][first]), minlength=len(starts))
    if len(mass) and mass.min() < 1 - MASS_TOLERANCE:
        raise RuntimeError(
            f"the {params.top_k + ROOM_FOR_TIES} likeliest tokens that vLLM reported hold only {mass.min():.6f} of the "
            f"probability it sampled from at token {mass.argmin()}: more than {ROOM_FOR_TIES} tokens tie for place "
            f"top_k={params.top_k}. Use dtype float32 or another top_k."
        )
    offsets = np.searchsorted(places, np.arange(len(starts) + 1))
    return SamplingMask(offsets.astype(np.int64), (keys & 0xFFFFFFFF).astype(np.int32))


def _cpu_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM's kernels on the CPU need, by a checkpoint's config.json."""
    # The in-place rotary kernel works on a copy of latent attention's keys: positions are silently lost. Torch's is right.
    settings: dict[str, Any] = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
    if config.get("kv_lora_rank"):
        # The same latent-attention kernel on every processor, with and without matrix tiles.
        settings["attention_config"] = {"backend": "CPU_MLA"}
    return settings


def _set_environment(num_threads: int) -> None:
    """vLLM reads these when it is imported, so they are set first; a value that the user has set stays."""
    import torch

    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model lives in this process
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(num_threads),
    }
    if not torch.cuda.is_available():
        settings["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # other processes share the cores
        # Without graphs, only the rank of sampled tokens is compiled: 10 s and a C++ compiler for an unused number.
        settings["TORCHDYNAMO_DISABLE"] = "1"
    for key, value in settings.items():
        os.environ.setdefault(key, value)


def checkpoint_shapes(checkpoint_dir: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each weight in the folder's safetensors files, read from their headers alone."""
    from safetensors import safe_open

    files = sorted(checkpoint_dir.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{checkpoint_dir} holds no .safetensors file: give a Hugging Face checkpoint folder")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            shapes.update({name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()})  # noqa: SIM118 (not a dict)
    config = read_values(checkpoint_dir)
    return {name: shape for name, shape in shapes.items() if sampling_uses(name, config)}


def read_values(checkpoint_dir: Path) -> dict[str, Any]:
    """The checkpoint's config.json."""
    return json.loads((checkpoint_dir / "config.json").read_text())


def sampling_uses(name: str, config: Mapping[str, Any]) -> bool:
    """Whether vLLM takes this weight: not layers of multi-token prediction, which follow the last decoder layer, nor a
    tied head that repeats the embedding, nor rotary frequencies, which follow from the config."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"] and int(parts[2]) >= config["num_hidden_layers"]:
        return False
    repeats = name == "lm_head.weight" and config.get("tie_word_embeddings", False)
    return not repeats and not name.endswith("rotary_emb.inv_freq")
