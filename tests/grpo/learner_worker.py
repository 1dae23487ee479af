"""One rank of the learner's process tests: every scenario alone first (rank 0), then together, and what came of each.

`python -m tests.grpo.learner_worker RANK WORLD FOLDER`; test_learner_processes.py starts it and reads
FOLDER/WORLD-RANK.json. One set of processes runs everything, because they are slow to start.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from grpo.batch import Batch, build_batch
from grpo.config import AlgorithmConfig, LearnerConfig
from grpo.learner import Learner, NonFiniteLossError
from policy.atomic import CheckpointError
from policy.deepseek import DeepseekPolicy
from policy.parallel import parallelize
from rollout.records import Sample, SamplingMask
from tests.policy.builders import TINY, tiny_policy

CONFIG = dataclasses.replace(TINY, num_hidden_layers=2, num_nextn_predict_layers=1)
TEMPERATURE = 0.9
# Prompts and completions: long beside short, and fewer samples than micro-batches of all ranks.
LENGTHS = ((3, 5), (6, 2), (2, 19), (4, 7), (5, 1), (1, 4), (7, 12))
ADVANTAGES = (1.0, -0.5, 0.7, -1.3, 0.4, 2.0, -0.9)


def make_samples(count: int = len(LENGTHS), seed: int = 0) -> list[Sample]:
    """Samples of no policy: their log-probabilities are far from any, so that every bound has something to cut."""
    random = np.random.default_rng(seed)
    return [_sample(random, index, *LENGTHS[index]) for index in range(count)]


def _sample(random: np.random.Generator, index: int, prompt: int, completion: int) -> Sample:
    ids = random.integers(CONFIG.vocab_size, size=prompt + completion)
    layers = CONFIG.num_moe_layers
    routed = np.argsort(random.random((len(ids), layers, CONFIG.n_routed_experts)))[..., : CONFIG.num_experts_per_tok]
    routed[-1] = -1
    kept = [sorted({int(token), *random.integers(CONFIG.vocab_size, size=30).tolist()}) for token in ids[prompt:]]
    offsets = np.cumsum([0, *map(len, kept)])
    return Sample(
        task_id=f"toy/{index}",
        sample_index=0,
        prompt_ids=tuple(ids[:prompt].tolist()),
        completion_ids=tuple(ids[prompt:].tolist()),
        rollout_logprobs=-4.0 + random.normal(size=completion) * 0.5,
        policy_versions=(0, 0),
        finish_reason="length" if index == 3 else "stop",
        completion_text="",
        routed_experts=routed,
        sampling_mask=SamplingMask(offsets.astype(np.int64), np.concatenate(kept).astype(np.int32)),
    )


def make_batch(count: int = len(LENGTHS), seed: int = 0) -> Batch:
    return build_batch(make_samples(count, seed), ADVANTAGES[:count])


def make_learner(
    folder: Path, learner: dict[str, Any], algorithm: dict[str, Any], model: DeepseekPolicy | None = None
) -> Learner:
    return Learner(
        tiny_policy(CONFIG) if model is None else model,
        LearnerConfig(**({"lr": 1e-4, "max_tokens_per_microbatch": 22} | learner)),
        AlgorithmConfig(**({"kl_coef": 0.0} | algorithm)),
        temperature=TEMPERATURE,
        seed=3,
        bad_batch_path=folder / "bad.pt",
    )


def whole(tensor: Tensor) -> Tensor:
    """torch's own way to gather a sharded tensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def learner_weights(learner: Learner) -> dict[str, Tensor]:
    """Of a learner of any kind, whole; all ranks call it."""
    return {key: whole(value) for key, value in learner.model.state_dict().items()}


SCENARIOS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "plain": ({}, {}, 7),
    "one_sample": ({}, {"kl_coef": 0.1}, 1),
    "minibatches_and_epochs": (
        {"num_minibatches": 3, "num_epochs": 2, "warmup_steps": 4, "weight_decay": 0.1, "max_grad_norm": 0.5},
        {"kl_coef": 0.1, "reference_ema_decay": 0.9, "aggregation": "sequence_mean"},
        7,
    ),
    "auxiliary_losses": (
        {"mtp_loss_weight": 0.3, "balance_alpha": 0.1, "balance_gamma": 0.01, "activation_checkpointing": True},
        {"mask_truncated": True, "aggregation": "constant", "constant_length": 12},
        7,
    ),
    "experts_over_ranks": (
        {"expert_parallel": 2, "num_minibatches": 2, "balance_gamma": 0.01},
        {"kl_coef": 0.1, "reference_refresh_steps": 2, "routing_replay": True},
        7,
    ),
    "mismatch_and_entropy": (
        {"num_minibatches": 2},
        {
            "entropy_target": 4.0,
            "entropy_coef": 0.001,
            "entropy_coef_step": 0.0005,
            "sampling_mask_replay": True,
            "surrogate": "cispo",
            "cispo_ratio_max": 1.2,
            "mismatch": {
                "truncate": "token",
                "truncate_max": 1.5,
                "mask": "sequence",
                "mask_min": 0.1,
                "mask_max": 9.0,
            },
        },
        7,
    ),
}


def run(name: str, folder: Path) -> dict[str, Any]:
    """Three steps of a scenario: metrics, weights and the reference's, and what `fill` says after them."""
    config, algorithm, count = SCENARIOS[name]
    alone = not dist.is_initialized()
    learner = make_learner(folder, config | ({"expert_parallel": 1} if alone else {}), algorithm)
    metrics = [learner.step(make_batch(count, seed), seed) for seed in range(3)]
    filled = learner.fill(make_batch(count, 9))
    return {
        "metrics": metrics,
        "weights": learner_weights(learner),
        "reference": learner.reference and {key: whole(value) for key, value in learner.reference.state_dict().items()},
        "old": filled.old_logprobs,
        "ref": filled.ref_logprobs,
        "entropy": learner.entropy,
    }


CUT_BY_RANKS = ("num_microbatches", "packing_waste", "imbalance_waste")


def compare(together: dict[str, Any], alone: dict[str, Any]) -> None:
    """As one process, within float noise."""
    for ours, theirs in zip(together["metrics"], alone["metrics"], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - set(CUT_BY_RANKS):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), key
    assert together["entropy"] == alone["entropy"]
    for field in ("old", "ref"):
        if alone[field] is None:
            assert together[field] is None
        else:
            torch.testing.assert_close(together[field], alone[field], atol=1e-4, rtol=0)
    for field in ("weights", "reference"):
        if alone[field] is None:
            continue
        assert together[field].keys() == alone[field].keys()
        gaps = torch.cat([(together[field][key] - alone[field][key]).abs().flatten() for key in alone[field]])
        # AdamW divides a gradient by its own size: where it is float noise, so is the update.
        assert (gaps > 2e-6).float().mean() < 2e-3, field
        assert gaps.max() < 2e-3, field


CHECKS: dict[str, tuple[tuple[int, ...], Callable[[Path], None]]] = {}


def check(*worlds: int) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Register a check, for these numbers of processes, of what they do beside the scenarios."""

    def register(function: Callable[[Path], None]) -> Callable[[Path], None]:
        CHECKS[function.__name__] = (worlds, function)
        return function

    return register


def worlds_of(name: str) -> tuple[int, ...]:
    """The numbers of processes that a scenario or check is for: experts are split over 2, and 8 over no 3."""
    if name in CHECKS:
        return CHECKS[name][0]
    return (2,) if "expert_parallel" in SCENARIOS[name][0] else (2, 3)


@check(2, 3)
def all_skip_what_one_cannot_use(folder: Path) -> None:
    """A sample that is not a number is one rank's: every rank skips the step, stays as it was, and stops in the end."""
    learner = make_learner(folder, {"max_skipped_steps": 2}, {})
    before = {key: whole(value) for key, value in learner.model.named_parameters()}
    batch = make_batch()
    broken = batch.with_advantages([float("nan"), *ADVANTAGES[1:]])
    assert learner.step(broken, 0)["skipped"] == 1
    assert all(torch.equal(whole(value), before[key]) for key, value in learner.model.named_parameters())
    assert learner.step(batch, 1)["skipped"] == 0
    assert learner.skipped_in_a_row == 0
    learner.step(broken, 2)
    with pytest.raises(NonFiniteLossError, match="2 optimizer steps in a row"):
        learner.step(broken, 3)
    dist.barrier()
    assert sorted(torch.load(folder / "bad.pt")["sequence_index"].tolist()) == list(range(len(LENGTHS)))


@check(2, 3)
def shares_are_balanced_and_counted(folder: Path) -> None:
    learner = make_learner(folder, {}, {})
    metrics = learner.step(make_batch(), 0)
    tokens = sum(prompt + completion for prompt, completion in LENGTHS)
    assert metrics["num_microbatches"] >= -(-tokens // (22 * dist.get_world_size()))
    assert 0 < metrics["imbalance_waste"] < 0.5
    assert metrics["num_optimizer_steps"] == 1


@check(2)
def state_is_taken_up_by_new_learners(folder: Path) -> None:
    """Also one whose policy came spread over the ranks; and without the state it would go elsewhere."""
    config, algorithm, _ = SCENARIOS["minibatches_and_epochs"]
    config = config | {"expert_parallel": 2}
    algorithm = algorithm | {"entropy_target": 4.0, "entropy_coef": 0.001}
    learner = make_learner(folder, config, algorithm)
    for seed in range(2):
        learner.step(make_batch(seed=seed), seed)
    state = folder / "state"
    if dist.get_rank() == 0:
        state.mkdir()
    dist.barrier()
    learner.sharded_state(state)
    before = learner_weights(learner)
    model = parallelize(tiny_policy(CONFIG, seed=5), expert_parallel=2)
    model.load_state_dict(learner.model.state_dict())
    resumed = make_learner(folder, config, algorithm, model)
    with pytest.raises(CheckpointError, match=r"learner\.json"):
        resumed.load_sharded_state(folder / "nowhere")
    resumed.load_sharded_state(state)
    assert resumed.entropy == learner.entropy
    assert resumed.num_optimizer_steps == learner.num_optimizer_steps == 12
    assert resumed.step(make_batch(seed=2), 2) == learner.step(make_batch(seed=2), 2)
    for key, value in learner.model.state_dict().items():
        assert torch.equal(whole(resumed.model.state_dict()[key]), whole(value)), key
    with pytest.raises(ValueError, match="sharded_state"):
        learner.state_dict()
    after = learner_weights(learner)
    if dist.get_rank() == 0:
        torch.save({"before": before, "after": after}, folder / "weights.pt")


@check(3)
def state_of_two_ranks_goes_on_in_three(folder: Path) -> None:
    saved = torch.load(folder / "weights.pt")
    config, algorithm, _ = SCENARIOS["minibatches_and_epochs"]
    algorithm = algorithm | {"entropy_target": 4.0, "entropy_coef": 0.001}
    model = tiny_policy(CONFIG, seed=5)
    model.load_state_dict(saved["before"])
    resumed = make_learner(folder, config, algorithm, model)
    resumed.load_sharded_state(folder / "state")
    resumed.step(make_batch(seed=2), 2)
    weights = learner_weights(resumed)
    gaps = torch.cat([(weights[key] - value).abs().flatten() for key, value in saved["after"].items()])
    moved = torch.cat([(saved["before"][key] - value).abs().flatten() for key, value in saved["after"].items()])
    assert (gaps > 2e-6).float().mean() < 2e-3
    assert (moved > 2e-5).float().mean() > 0.3


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    if rank == 0 and not (folder / "alone.pt").exists():
        torch.save({name: run(name, folder / "alone") for name in SCENARIOS}, folder / "alone.pt")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init-{world}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    alone = torch.load(folder / "alone.pt", weights_only=False)
    tasks = {name: lambda name=name: compare(run(name, folder), alone[name]) for name in SCENARIOS}
    tasks |= {name: lambda function=function: function(folder) for name, (_, function) in CHECKS.items()}
    results: dict[str, str | None] = {}
    for name, task in tasks.items():
        if world not in worlds_of(name) or (sys.argv[4:] and name not in sys.argv[4:]):
            continue
        try:
            task()
            results[name] = None
        except Exception:  # noqa: BLE001 (its text is the result)
            results[name] = traceback.format_exc()
        (folder / f"{world}-{rank}.json").write_text(json.dumps(results))
        if results[name] is not None:  # the ranks may be at different places now: the others time out
            sys.exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
