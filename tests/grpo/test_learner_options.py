"""What the learner's options do: epochs, filling, references, entropy, replays, offloading, bfloat16."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from grpo.batch import Batch, build_batch, split_minibatches
from grpo.learner_optimizer import LearnerOptimizer
from policy.logprobs import token_logprobs
from rollout.errors import UserError
from rollout.records import SamplingMask
from tests.grpo.learner_builders import (
    ADVANTAGES,
    COMPLETIONS,
    SMALL,
    TEMPERATURE,
    largest_move,
    make_batch,
    make_learner,
    make_samples,
    weights_of,
)
from tests.policy.builders import packed_logits, tiny_policy
from tests.policy.dense_builders import dense_policy


def recorded_splits(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """Filled, as the learner goes on, with the samples of every minibatch of every epoch."""
    seen: list[list[list[int]]] = []

    def record(*args: Any, **kwargs: Any) -> list[Batch]:
        parts = split_minibatches(*args, **kwargs)
        seen.append([part.sequence_index.tolist() for part in parts])
        return parts

    monkeypatch.setattr("grpo.learner.split_minibatches", record)
    return seen


def test_every_epoch_splits_all_samples_anew_and_a_seed_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = recorded_splits(monkeypatch)
    for _ in range(2):
        make_learner(tmp_path, num_epochs=3, num_minibatches=2).step(make_batch(tiny_policy(SMALL)), 5)
    first, again = seen[:3], seen[3:]
    assert first == again
    assert all(sorted(chain(*epoch)) == list(range(6)) for epoch in first)
    assert first[0] != first[1] != first[2] != first[0]


def test_epochs_go_on_from_the_same_old_policy(tmp_path: Path) -> None:
    together = make_learner(tmp_path, num_epochs=3, lr=1e-2)
    one_by_one = make_learner(tmp_path, lr=1e-2)
    batch = make_batch(tiny_policy(SMALL))
    metrics = together.step(batch, 0)
    filled = one_by_one.fill(batch)
    each = [one_by_one.step(filled, step) for step in range(3)]
    assert metrics["logprob_gap_max"] < 1e-5  # old probabilities are those of before the first epoch, in the last too
    assert each[2]["ratio_mean"] != pytest.approx(1.0, abs=1e-3)
    for name in ("loss", "ratio_mean", "clip_fraction", "entropy", "grad_norm"):
        assert metrics[name] == pytest.approx(sum(m[name] for m in each) / 3, rel=1e-4, abs=1e-6), name
    gaps = torch.cat([(p - weights_of(one_by_one)[n]).abs().flatten() for n, p in weights_of(together).items()])
    assert (gaps > 1e-5).float().mean() < 2e-3


def test_fill_says_what_policy_and_reference_say_and_step_believes_it(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, kl_coef=0.1, max_tokens_per_microbatch=13)
    learner.step(make_batch(learner.model), 0)
    batch = make_batch(tiny_policy(SMALL), seed=1)
    filled = learner.fill(batch)
    assert learner.reference is not None
    for values, model in ((filled.old_logprobs, learner.model), (filled.ref_logprobs, learner.reference)):
        with torch.no_grad():
            said = token_logprobs(model, batch.input_ids, batch.position_ids, batch.cu_seqlens, temperature=TEMPERATURE)
        assert values is not None
        assert torch.allclose(values, said.logprobs * batch.completion_mask, atol=1e-5)
    assert batch.old_logprobs is None
    believed = dataclasses.replace(filled, ref_logprobs=filled.rollout_logprobs - 0.5)
    k3 = float(torch.exp(torch.tensor(-0.5)) + 0.5 - 1)
    filled_again = learner.fill(believed)
    assert filled_again.ref_logprobs is believed.ref_logprobs
    untouched = make_learner(tmp_path, kl_coef=0.1)
    own = make_batch(tiny_policy(SMALL), seed=1)
    said_otherwise = dataclasses.replace(own, ref_logprobs=own.rollout_logprobs - 0.5)
    assert untouched.step(said_otherwise, 0)["kl"] == pytest.approx(k3, rel=1e-3)


def test_measuring_the_old_policy_counts_no_load(tmp_path: Path) -> None:
    learner = make_learner(tmp_path)
    learner.model.train()
    learner.fill(make_batch(learner.model))
    assert all(block.load.sum() == 0 for block in learner.model.moe_blocks.values())


def test_cut_off_completions_teach_nothing_and_count_in_no_mean(tmp_path: Path) -> None:
    masked = make_learner(tmp_path, algorithm={"mask_truncated": True})
    samples = make_samples(masked.model)
    cut = [dataclasses.replace(s, finish_reason="length") if i in (1, 4) else s for i, s in enumerate(samples)]
    metrics = masked.step(build_batch(cut, ADVANTAGES), 0)
    kept = [0, 2, 3, 5]
    without = make_learner(tmp_path)
    expected = without.step(build_batch([samples[i] for i in kept], [ADVANTAGES[i] for i in kept]), 0)
    for name in ("loss", "entropy", "grad_norm", "logprob_gap_mean"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7), name
    assert make_learner(tmp_path).step(build_batch(cut, ADVANTAGES), 0)["loss"] != pytest.approx(expected["loss"])


def test_a_step_of_nothing_but_cut_off_completions_moves_nothing(tmp_path: Path) -> None:
    algorithm = {"mask_truncated": True, "entropy_target": 4.0, "entropy_coef": 0.001}
    learner = make_learner(tmp_path, algorithm=algorithm)
    before, entropy = weights_of(learner), learner.entropy
    samples = [dataclasses.replace(s, finish_reason="length") for s in make_samples(learner.model)]
    metrics = learner.step(build_batch(samples, ADVANTAGES), 0)
    assert (metrics["loss"], metrics["skipped"]) == (0, 0)
    assert largest_move(learner, before) == 0
    assert learner.entropy == entropy


def test_the_reference_follows_at_its_own_pace(tmp_path: Path) -> None:
    learner = make_learner(
        tmp_path, lr=0.01, algorithm={"kl_coef": 0.1, "reference_ema_decay": 0.75}, balance_gamma=0.1
    )
    expected = {name: value.clone() for name, value in learner.model.state_dict().items()}
    for step in range(3):
        learner.step(make_batch(tiny_policy(SMALL), seed=step), step)
        for name, value in learner.model.state_dict().items():
            expected[name] = 0.75 * expected[name] + 0.25 * value
    assert learner.reference is not None
    state = learner.reference.state_dict()
    assert any(name.endswith("e_score_correction_bias") for name in state)
    for name, value in state.items():
        assert torch.allclose(value, expected[name], atol=1e-6), name
    assert not any(parameter.requires_grad for parameter in learner.reference.parameters())


def test_the_reference_is_refreshed_every_so_many_steps(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, lr=0.01, algorithm={"kl_coef": 0.1, "reference_refresh_steps": 2})
    kls = [learner.step(make_batch(tiny_policy(SMALL)), step)["kl"] for step in range(5)]
    assert [kl > 1e-5 for kl in kls] == [False, True, False, True, False]


def test_the_reference_moves_on_in_steps_with_nothing_to_learn(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, lr=0.01, algorithm={"kl_coef": 0.1, "reference_refresh_steps": 2})
    learner.step(make_batch(tiny_policy(SMALL)), 0)
    before = weights_of(learner)
    assert learner.step(None, 1) == {}
    assert largest_move(learner, before) == 0
    assert learner.step(make_batch(tiny_policy(SMALL)), 2)["kl"] < 1e-9


def test_any_seed_of_the_config_splits_the_samples(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, num_minibatches=2)
    learner.seed = 10**30
    assert learner.step(make_batch(tiny_policy(SMALL)), 0)["num_optimizer_steps"] == 2


def test_an_entropy_bonus_makes_the_policy_more_random_and_is_steered(tmp_path: Path) -> None:
    steady = make_learner(tmp_path, lr=1e-2, algorithm={"entropy_coef": 1.0})
    batch = make_batch(tiny_policy(SMALL), (0.0,) * 6)
    metrics = [steady.step(batch, step) for step in range(3)]
    assert metrics[0]["entropy"] < metrics[1]["entropy"] < metrics[2]["entropy"]
    assert metrics[0]["loss"] == pytest.approx(-metrics[0]["entropy"], rel=1e-4)  # the advantages are 0
    assert [m["entropy_coef"] for m in metrics] == [1.0, 1.0, 1.0]
    options = {"entropy_coef": 0.002, "entropy_coef_step": 0.001, "entropy_coef_max": 0.004}
    low = make_learner(tmp_path, algorithm=options | {"entropy_target": 99.0})
    assert [low.step(batch, s)["entropy_coef"] for s in range(4)] == pytest.approx([0.002, 0.003, 0.004, 0.004])
    high = make_learner(tmp_path, algorithm=options | {"entropy_target": 1e-3})
    assert [high.step(batch, s)["entropy_coef"] for s in range(3)] == pytest.approx([0.002, 0.0, 0.0])


def test_the_engine_s_distance_is_measured_and_cut(tmp_path: Path) -> None:
    samples = make_samples(tiny_policy(SMALL))
    shifted = [
        dataclasses.replace(s, rollout_logprobs=s.rollout_logprobs + (-1.0 if i == 2 else 0.1))
        for i, s in enumerate(samples)
    ]
    mismatch = {"truncate": "token", "truncate_max": 2.0, "mask": "token", "mask_min": 0.95, "mask_max": 9.0}
    learner = make_learner(tmp_path, algorithm={"mismatch": mismatch})
    metrics = learner.step(build_batch(shifted, ADVANTAGES), 0)
    share = COMPLETIONS[2] / sum(COMPLETIONS)
    assert metrics["mismatch_truncated"] == pytest.approx(share)  # e > 2
    assert metrics["mismatch_masked"] == pytest.approx(1 - share)  # exp(-0.1) < 0.95
    assert metrics["rollout_kl_k1"] == pytest.approx(0.1 * (1 - share) - share, rel=1e-3)
    assert metrics["policy_loss"] == pytest.approx(-2.0 * ADVANTAGES[2] * share, rel=1e-4)


def test_what_sampling_cut_off_is_cut_off_in_the_learner(tmp_path: Path) -> None:
    model = tiny_policy(SMALL)
    samples = []
    for sample in make_samples(model):
        sequence, start = [*sample.prompt_ids, *sample.completion_ids], len(sample.prompt_ids)
        logits = packed_logits(model, [sequence])[start - 1 : -1].detach() / TEMPERATURE
        kept = [
            sorted({token, *row.topk(5).indices.tolist()}) for token, row in zip(sequence[start:], logits, strict=True)
        ]
        values = [
            float(row[ids].log_softmax(-1)[ids.index(t)])
            for t, row, ids in zip(sequence[start:], logits, kept, strict=True)
        ]
        offsets = np.cumsum([0, *map(len, kept)])
        mask = SamplingMask(offsets, np.concatenate(kept).astype(np.int32))
        samples.append(dataclasses.replace(sample, rollout_logprobs=np.array(values), sampling_mask=mask))
    batch = build_batch(samples, ADVANTAGES)
    for max_tokens in (8192, 13):
        replayed = make_learner(
            tmp_path, algorithm={"sampling_mask_replay": True}, max_tokens_per_microbatch=max_tokens
        )
        assert replayed.step(batch, 0)["logprob_gap_max"] < 1e-4
    assert make_learner(tmp_path).step(batch, 0)["logprob_gap_mean"] > 0.5


@pytest.mark.parametrize("option", ["routing_replay", "sampling_mask_replay"])
def test_what_cannot_be_replayed_is_named(tmp_path: Path, option: str) -> None:
    learner = make_learner(tmp_path, algorithm={option: True})
    for call in (learner.fill, lambda batch: learner.step(batch, 0)):
        with pytest.raises(UserError, match=f"algorithm.{option} needs"):
            call(make_batch(learner.model))


def test_states_rest_in_main_memory_between_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[str] = []
    move, adamw_step = LearnerOptimizer._move_states, torch.optim.AdamW.step

    def record_move(self: LearnerOptimizer, device: torch.device) -> None:
        moves.append("rest" if len(moves) % 3 else f"to {device.type}")
        move(self, device)

    def record_step(self: torch.optim.AdamW, *args: Any) -> Any:
        moves.append("step")
        return adamw_step(self, *args)

    monkeypatch.setattr(LearnerOptimizer, "_move_states", record_move)
    monkeypatch.setattr(torch.optim.AdamW, "step", record_step)
    offloaded, other = make_learner(tmp_path, offload_optimizer=True), make_learner(tmp_path)
    for step in range(2):
        offloaded.step(make_batch(tiny_policy(SMALL)), step)
    assert moves == [f"to {offloaded.device.type}", "step", "rest"] * 2
    for step in range(2):
        other.step(make_batch(tiny_policy(SMALL)), step)
    assert largest_move(offloaded, weights_of(other)) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: states are in main memory anyway")
def test_states_leave_the_gpu(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, offload_optimizer=True)
    for step in range(2):
        learner.step(make_batch(tiny_policy(SMALL)), step)
        states = [v for state in learner.optimizer.adamw.state.values() for v in state.values()]
        assert {value.device.type for value in states} == {"cpu"}
    assert learner.device.type == "cuda"


def test_idle_drafts_have_no_optimizer_state(tmp_path: Path) -> None:
    deep = dataclasses.replace(SMALL, num_nextn_predict_layers=1)
    for weight in (0.0, 0.1):
        learner = make_learner(tmp_path, tiny_policy(deep), mtp_loss_weight=weight)
        learner.step(make_batch(tiny_policy(deep)), 0)
        drafts = {id(p) for layer in learner.model.mtp_layers for p in layer.parameters()}
        stepped = {id(p) for p, state in learner.optimizer.adamw.state.items() if state}
        taken = {id(p) for group in learner.optimizer.adamw.param_groups for p in group["params"]}
        assert stepped == taken
        assert bool(taken & drafts) == bool(weight)


def test_processes_without_a_group_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"bfloat16.*process group"):
        make_learner(tmp_path, dtype="bfloat16")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="started as 2 processes"):
        make_learner(tmp_path)


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_bfloat16_learns_about_the_same_on_weights_in_float32(tmp_path: Path) -> None:
    options: dict[str, Any] = {"kl_coef": 0.1, "num_minibatches": 2, "balance_gamma": 0.01}
    narrow, wide = (make_learner(tmp_path, dtype=dtype, **options) for dtype in ("bfloat16", "float32"))
    assert (narrow.spread, wide.spread) == (True, False)  # a group of one may be an engine's
    before = weights_of(narrow)
    for step in range(2):
        batch = make_batch(tiny_policy(SMALL), seed=step)
        ours, theirs = narrow.step(batch, step), wide.step(batch, step)
        assert 1e-5 < ours["logprob_gap_mean"] < 0.1
        for name in ("entropy", "grad_norm", "policy_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=0.1, abs=0.02), name
    assert largest_move(narrow, before) > 5e-4
    assert {p.dtype for p in narrow.model.parameters()} == {torch.float32}
    (tmp_path / "state").mkdir()
    narrow.sharded_state(tmp_path / "state")
    again = make_learner(tmp_path, dtype="bfloat16", **options)
    again.model.load_state_dict(narrow.model.state_dict())
    again.load_sharded_state(tmp_path / "state")
    batch = make_batch(tiny_policy(SMALL), seed=2)
    assert again.step(batch, 2) == narrow.step(batch, 2)


def test_fp8_learns_nearly_what_full_precision_does_and_is_refused_to_a_dense_policy(tmp_path: Path) -> None:
    exact, coarse = (make_learner(tmp_path, kl_coef=0.1, precision=precision) for precision in ("bf16", "fp8"))
    batch = make_batch(tiny_policy(SMALL))
    assert batch.rollout_logprobs.any()
    measured = [learner.step(batch, 0) for learner in (exact, coarse)]
    assert measured[0]["logprob_gap_mean"] < 1e-5 < measured[1]["logprob_gap_mean"] < 0.3
    assert coarse.reference is not None
    assert measured[1]["kl"] == pytest.approx(0.0, abs=1e-9)  # the reference is computed in FP8 too
    directions = []
    for learner in (exact, coarse):
        grads = [p.grad.flatten() for p in learner.model.parameters() if p.grad is not None]
        directions.append(torch.cat(grads))
    assert torch.cosine_similarity(*directions, dim=0) > 0.97
    assert not torch.equal(*directions)
    with pytest.raises(UserError, match=r"dense one learns in learner\.dtype"):
        make_learner(tmp_path, dense_policy("llama"), precision="fp8")
