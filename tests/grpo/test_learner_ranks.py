"""The learner's handles: in this process, as the only rank, and over Ray actors, which must all learn the same."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo.batch import Batch, build_batch
from grpo.config import TrainConfig
from grpo.learner import NonFiniteLossError
from grpo.learner_handle import LearnerHandle, LocalLearner, open_learner
from grpo.learner_ranks import LoneRank, RayLearner
from policy.checkpoint import CheckpointError, load_policy, save_policy
from policy.parallel import ParallelismError
from rollout.cluster import RankError, running_cluster
from rollout.engine import SamplingParams
from rollout.records import Sample
from rollout.torch_engine import TorchEngine
from rollout.weights import WeightSync, WeightSyncError
from tests.grpo.test_learner import SMALL, TEMPERATURE, make_batch
from tests.policy.builders import VOCAB, random_sequences, tiny_policy
from tests.policy.dense_builders import dense_policy

TASKS = {"source": "generator", "generator": "arithmetic"}
RAY = {"placement": "ray", "num_ranks": 2, "num_threads": 1, "step_timeout_s": 300.0}


def config_of(**learner: Any) -> TrainConfig:
    """A config whose learner has a reference, two minibatches, moving routing biases and the given settings."""
    return TrainConfig.model_validate(
        {
            "name": "ranks",
            "num_steps": 4,
            "num_prompts": 3,
            "group_size": 2,
            "policy": {"path": "unused"},
            "data": TASKS,
            "rewards": [{"name": "accuracy", "verifier": "numeric"}],
            "sampling": {"temperature": TEMPERATURE, "max_completion_tokens": 8},
            "engine": {"kind": "torch", "placement": "in_process", "max_model_len": 16},
            "algorithm": {"kl_coef": 0.1, "reference_refresh_steps": 2},
            "learner": {
                "lr": 1e-3,
                "num_minibatches": 2,
                "balance_gamma": 0.01,
                "max_tokens_per_microbatch": 20,
                "max_skipped_steps": 1,
                **learner,
            },
            "eval": {"data": TASKS},
        }
    )


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_policy(tiny_policy(SMALL), folder)
    return folder


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch(tiny_policy(SMALL))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray node; yields the folder of logs."""
    pytest.importorskip("ray")
    log_dir = tmp_path_factory.mktemp("logs")
    with running_cluster(log_dir):
        yield log_dir


def opened(weights_dir: Path, folder: Path, **learner: Any) -> LearnerHandle:
    return open_learner(config_of(**learner), weights_dir, bad_batch_path=folder / "bad.pt", log_dir=folder / "logs")


@pytest.fixture(scope="module")
def alone(weights_dir: Path, batch: Batch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process says of a batch and its probe, and its metrics and weights after two steps."""
    learner = opened(weights_dir, tmp_path_factory.mktemp("alone"))
    return after_two_steps(learner, batch)


def after_two_steps(learner: LearnerHandle, batch: Batch) -> dict[str, Any]:
    filled = learner.fill(batch)
    prompts, completions = probe()
    gap = learner.measure_gap(prompts, completions)
    metrics = [learner.step(batch, step) for step in range(2)]
    return {"filled": filled, "gap": gap, "metrics": metrics, "weights": copied(learner.weights())}


def probe() -> tuple[list[list[int]], list[Any]]:
    prompts = random_sequences((3, 5), seed=4)
    engine = TorchEngine(tiny_policy(SMALL, seed=8))
    return prompts, engine.generate(prompts, SamplingParams(max_completion_tokens=6), [0, 1])


def copied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same but for the order of sums over ranks."""
    for field in ("old_logprobs", "ref_logprobs"):
        theirs = getattr(expected["filled"], field)
        assert (getattr(found["filled"], field) - theirs).abs().max() < 1e-5
        assert theirs.abs().max() > 1  # something was compared
    assert found["gap"].mean == pytest.approx(expected["gap"].mean, abs=1e-6)
    assert expected["gap"].mean > 0.01
    for ours, theirs in zip(found["metrics"], expected["metrics"], strict=True):
        # How the tokens lie in micro-batches is the one thing that the number of ranks is to change.
        packing = {name for name in theirs if "waste" in name or name == "num_microbatches"}
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() - packing:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    assert list(found["weights"]) == list(expected["weights"])
    gaps = [(found["weights"][name] - weight).abs().flatten() for name, weight in expected["weights"].items()]
    # AdamW's first steps divide a gradient by its own size, so where it is float noise the update is too.
    assert (torch.cat(gaps) > 1e-5).float().mean() < 1e-3


# --- in this process -------------------------------------------------------------------------------------------------


def test_a_snapshot_is_of_its_moment_and_goes_on_from_there(weights_dir: Path, batch: Batch, tmp_path: Path) -> None:
    learner = opened(weights_dir, tmp_path)
    assert isinstance(learner, LocalLearner)
    assert learner.can_write_in_background
    learner.step(batch, 0)
    before = copied(learner.weights())
    write = learner.snapshot(1)
    metrics = learner.step(batch, 1)
    after = copied(learner.weights())
    write(tmp_path)
    expected = tmp_path / "expected"
    expected.mkdir()
    save_policy(learner.scratch(), expected)
    assert {path.name for path in expected.iterdir()} | {"learner.pt"} <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "config.json").read_bytes() == (expected / "config.json").read_bytes()

    again = opened(tmp_path, tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in again.weights().items())
    again.load_state(tmp_path)
    assert again.step(batch, 1) == metrics
    assert all(torch.equal(weight, after[name]) for name, weight in again.weights().items())
    assert not all(torch.equal(after[name], before[name]) for name in after)


def test_a_checkpoint_takes_about_as_many_bytes_as_announced(weights_dir: Path, batch: Batch, tmp_path: Path) -> None:
    learner = opened(weights_dir, tmp_path)
    learner.step(batch, 0)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    learner.snapshot(1)(folder)
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert 0.8 * learner.num_bytes < written < learner.num_bytes


def test_the_scratch_policy_is_a_copy(weights_dir: Path, tmp_path: Path) -> None:
    learner = opened(weights_dir, tmp_path)
    before = copied(learner.weights())
    with torch.no_grad():
        for parameter in learner.scratch().parameters():
            parameter.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in learner.weights().items())


def test_the_only_rank_in_half_precision_keeps_its_weights_in_full(
    weights_dir: Path, batch: Batch, alone: dict[str, Any], tmp_path: Path
) -> None:
    learner = opened(weights_dir, tmp_path, dtype="bfloat16")
    try:
        assert isinstance(learner, LoneRank)
        assert not learner.can_write_in_background
        found = after_two_steps(learner, batch)
        assert {weight.dtype for weight in found["weights"].values()} == {torch.float32}
        for field in ("old_logprobs", "ref_logprobs"):
            gaps = (getattr(found["filled"], field) - getattr(alone["filled"], field)).abs()
            assert 1e-4 < gaps.max() < 0.2
        assert found["metrics"][0]["entropy"] == pytest.approx(alone["metrics"][0]["entropy"], rel=0.02)
        assert found["gap"].mean == pytest.approx(alone["gap"].mean, rel=0.05)
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        learner.snapshot(2)(folder)
        metrics, after = learner.step(batch, 2), copied(learner.weights())
    finally:
        learner.close()

    stored = dict(load_policy(folder).state_dict())
    assert torch.equal(stored["model.embed_tokens.weight"], found["weights"]["model.embed_tokens.weight"])
    again = opened(folder, tmp_path, dtype="bfloat16")
    try:
        again.load_state(folder)
        assert again.step(batch, 2) == metrics
        assert all(torch.equal(weight, after[name]) for name, weight in again.weights().items())
        WeightSync(TorchEngine(load_policy(folder)), vocab_size=VOCAB, engine_dtype="bfloat16").publish(again, 3)
    finally:
        again.close()


def test_a_dense_policy_spread_over_one_rank_learns_as_it_is(tmp_path: Path) -> None:
    save_policy(dense_policy("qwen3_tied"), tmp_path)
    prompts = random_sequences((3, 5), seed=4, vocab=60)
    completions = TorchEngine(load_policy(tmp_path)).generate(prompts, SamplingParams(max_completion_tokens=6), [0, 1])
    samples = [
        Sample(
            task_id=f"toy/{index}",
            sample_index=0,
            prompt_ids=tuple(prompt),
            completion_ids=tuple(completion.token_ids),
            rollout_logprobs=np.array(completion.logprobs, dtype=np.float32),
            policy_versions=(0, 0),
            finish_reason="stop",
            completion_text="",
        )
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
    batch = build_batch(samples, [1.0, -1.0])
    found = []
    for dtype in ("float32", "bfloat16"):
        learner = opened(tmp_path, tmp_path, dtype=dtype, balance_gamma=0.0)
        try:
            before = copied(learner.weights())
            metrics = learner.step(batch, 0)
            found.append((before, metrics, copied(learner.weights())))
        finally:
            learner.close()
    (ours, metrics, moved), (theirs, half_metrics, half_moved) = found
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert half_metrics["entropy"] == pytest.approx(metrics["entropy"], rel=0.01)
    assert half_metrics["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=0.05)
    steps = [torch.cat([(a[n] - ours[n]).flatten() for n in ours]) for a in (moved, half_moved)]
    assert torch.cosine_similarity(*steps, dim=0) > 0.9


def test_a_start_that_fails_leaves_no_process_group(weights_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        opened(tmp_path, tmp_path, dtype="bfloat16")
    opened(weights_dir, tmp_path, dtype="bfloat16").close()


def test_state_of_another_kind_of_learner_is_refused(weights_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no learner\.pt.*learner\.placement"):
        opened(weights_dir, tmp_path).load_state(tmp_path)
    learner = opened(weights_dir, tmp_path, dtype="bfloat16")
    try:
        with pytest.raises(CheckpointError, match=r"no folder learner.*learner\.placement"):
            learner.load_state(tmp_path)
    finally:
        learner.close()


# --- over Ray actors -------------------------------------------------------------------------------------------------


@pytest.mark.stack
def test_two_ranks_learn_what_one_does_and_go_on_from_their_checkpoint(
    weights_dir: Path, batch: Batch, alone: dict[str, Any], cluster: Path, tmp_path: Path
) -> None:
    learner = opened(weights_dir, tmp_path, **RAY)
    assert isinstance(learner, RayLearner)
    assert learner.policy_config == SMALL
    compare(after_two_steps(learner, batch), alone)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    learner.snapshot(2)(folder)
    before = copied(learner.weights())
    metrics, after = learner.step(batch, 2), copied(learner.weights())
    learner.close()
    assert sorted(path.name for path in (tmp_path / "logs").glob("*")) == ["learner-0.log", "learner-1.log"]

    again = opened(folder, tmp_path, **RAY)
    again.load_state(folder)
    assert all(torch.equal(weight, before[name]) for name, weight in again.weights().items())
    assert again.step(batch, 2) == pytest.approx(metrics, rel=1e-6)
    gaps = [(weight - after[name]).abs().max() for name, weight in again.weights().items()]
    assert max(gaps) < 1e-6
    again.close()


@pytest.mark.stack
def test_ranks_that_share_the_experts_publish_and_report_as_one(
    weights_dir: Path, batch: Batch, alone: dict[str, Any], cluster: Path, tmp_path: Path
) -> None:
    learner = opened(weights_dir, tmp_path, **RAY, expert_parallel=2)
    compare(after_two_steps(learner, batch), alone)
    engine = TorchEngine(tiny_policy(SMALL, seed=5))
    sync = WeightSync(engine, vocab_size=VOCAB)
    assert sync.publish(learner, 2).probe_gap_max < 1e-5
    learner.step(batch, 2)
    engine.load_weights = lambda weights, version: None  # type: ignore[method-assign]
    with pytest.raises(WeightSyncError, match="still has the previous weights entirely"):
        sync.publish(learner, 3)

    nan = batch.advantages.clone()
    nan[-1] = float("nan")
    with pytest.raises(NonFiniteLossError, match="no finite loss"):
        learner.step(dataclasses.replace(batch, advantages=nan), 3)
    assert torch.load(tmp_path / "bad.pt")["advantages"].isnan().any()
    learner.close()


@pytest.mark.stack
def test_a_rank_that_is_killed_ends_the_step_with_its_name(
    weights_dir: Path, batch: Batch, cluster: Path, tmp_path: Path
) -> None:
    import ray

    learner = opened(weights_dir, tmp_path, **(RAY | {"step_timeout_s": 3600.0}))
    assert isinstance(learner, RayLearner)
    actor = learner.group.actors[1]

    def die_in_the_step(host: Any) -> None:
        host.host.learner.model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))

    ray.get(actor.__ray_call__.remote(die_in_the_step))
    with pytest.raises(RankError) as caught:
        learner.step(batch, 5)
    message = str(caught.value)
    assert message.startswith("learner-1 failed while learning from step 5: its process died")
    assert str(tmp_path / "logs" / "learner-1.log") in message
    with pytest.raises(RankError, match="learner-1 failed while learning from step 5"):
        learner.weights()
    learner.close()


@pytest.mark.stack
def test_a_layout_that_does_not_fit_is_refused_at_the_start(weights_dir: Path, cluster: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    save_policy(tiny_policy(dataclasses.replace(SMALL, n_routed_experts=7)), odd)
    with pytest.raises(ParallelismError, match="does not divide n_routed_experts=7"):
        opened(odd, tmp_path, **RAY, expert_parallel=2)
