"""What every engine refuses before it starts work, and the error an engine that stopped working raises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rollout.engine import SamplingParams


class EngineError(RuntimeError):
    """An engine died, hung or failed: the message says while doing what, why, and where its log is."""


def check_request(
    prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int], max_model_len: int
) -> None:
    """ValueError for a request that no engine can serve: lengths in tokens, one seed per prompt."""
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
    if params.max_completion_tokens < 1:
        raise ValueError(f"max_completion_tokens must be at least 1, not {params.max_completion_tokens}")
    if params.temperature < 0 or not 0 < params.top_p <= 1:
        raise ValueError(f"temperature >= 0 and 0 < top_p <= 1 are needed, not {params.temperature} and {params.top_p}")
    if params.top_k < 0:
        raise ValueError(f"top_k must be 0 (all tokens) or more, not {params.top_k}")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty: it needs at least one token")
        if len(prompt) + params.max_completion_tokens > max_model_len:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens: with max_completion_tokens={params.max_completion_tokens} it "
                f"exceeds the engine's max_model_len={max_model_len}. Shorten the prompt or raise max_model_len."
            )


def check_weights(given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError that lists names missing from `given`, unknown to the engine, or of another shape than expected."""
    problems = {
        "missing": sorted(expected.keys() - given.keys()),
        "unknown to the engine": sorted(given.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(given[name])}, not {list(expected[name])}"
            for name in sorted(given.keys() & expected.keys())
            if given[name] != expected[name]
        ],
    }
    found = [f"{len(names)} {what}: {_shortened(names)}" for what, names in problems.items() if names]
    if found:
        raise ValueError(
            "these weights do not fit the engine's checkpoint; nothing was loaded. " + "; ".join(found) + ". "
            "Weights need Hugging Face names, one entry per expert (policy.checkpoint.hf_state_dict)."
        )


def _shortened(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
