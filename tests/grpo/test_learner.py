"""The learner on a tiny policy: what a step's gradient is, what it must not depend on, and what it survives."""

from __future__ import annotations

import dataclasses
import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.batch import Batch, build_batch
from grpo.config import AlgorithmConfig, LearnerConfig
from grpo.learner import Learner, NonFiniteLossError
from policy.logprobs import token_logprobs
from rollout.errors import UserError
from rollout.records import Sample
from tests.grpo.learner_builders import (
    ADVANTAGES,
    COMPLETIONS,
    NO_CLIPPING,
    PROMPTS,
    SMALL,
    TEMPERATURE,
    largest_move,
    make_batch,
    make_learner,
    make_samples,
    weights_of,
)
from tests.policy.builders import pack, packed_logits, tiny_policy


@pytest.mark.parametrize("max_tokens", [8192, 13])
def test_the_gradient_on_policy_is_reinforces(tmp_path: Path, max_tokens: int) -> None:
    learner = make_learner(tmp_path, max_grad_norm=NO_CLIPPING, max_tokens_per_microbatch=max_tokens)
    by_hand = tiny_policy(SMALL)
    samples = make_samples(by_hand)
    objective = torch.zeros(())
    for sample, advantage in zip(samples, ADVANTAGES, strict=True):
        ids = torch.tensor(sample.prompt_ids + sample.completion_ids)
        table = (packed_logits(by_hand, [ids.tolist()]) / TEMPERATURE).log_softmax(-1)
        start = len(sample.prompt_ids)
        chosen = table[start - 1 : -1].gather(1, ids[start:, None])
        objective = objective + advantage * chosen.sum()
    (-objective / sum(COMPLETIONS)).backward()
    metrics = learner.step(make_batch(by_hand), 0)
    squares = 0.0
    for name, parameter in learner.model.named_parameters():
        expected = by_hand.get_parameter(name).grad
        assert expected is not None, name
        assert parameter.grad is not None, name
        assert (parameter.grad - expected).abs().max() < 2e-5 * expected.abs().max() + 1e-9, name
        squares += float(expected.square().sum())
    assert metrics["grad_norm"] == pytest.approx(squares**0.5, rel=1e-4)
    assert metrics["ratio_mean"] == pytest.approx(1.0)
    assert metrics["clip_fraction"] == 0
    assert metrics["logprob_gap_max"] < 1e-5


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize(("num_minibatches", "kl_coef"), [(1, 0.0), (2, 0.1)])
def test_the_memory_knob_does_not_change_the_update(
    tmp_path: Path, aggregation: str, num_minibatches: int, kl_coef: float
) -> None:
    results = []
    for max_tokens in (8192, 20, 11):
        learner = make_learner(
            tmp_path,
            kl_coef=kl_coef,
            aggregation=aggregation,
            num_minibatches=num_minibatches,
            max_tokens_per_microbatch=max_tokens,
        )
        before = weights_of(learner)
        metrics = learner.step(make_batch(tiny_policy(SMALL)), 0)
        assert largest_move(learner, before) > 5e-4
        results.append((weights_of(learner), metrics))
    (whole, metrics), *others = results
    for weights, other_metrics in others:
        # AdamW's first steps divide a gradient by its own size, so where it is float noise the update is too.
        gaps = torch.cat([(weights[name] - whole[name]).abs().flatten() for name in whole])
        assert (gaps > 2e-6).float().mean() < 2e-3
        assert other_metrics["num_microbatches"] > metrics["num_microbatches"] == num_minibatches
        for name in metrics.keys() - {"num_microbatches", "packing_waste"}:
            assert other_metrics[name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-6), name


def test_without_advantage_and_kl_nothing_moves(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, lr=0.1, num_minibatches=2)
    before = weights_of(learner)
    metrics = learner.step(make_batch(learner.model, [0.0] * 6), 0)
    assert all(torch.equal(value, before[name]) for name, value in learner.model.named_parameters())
    assert metrics["loss"] == 0
    assert metrics["skipped"] == 0


def test_a_rewarded_sequence_becomes_likelier_and_a_punished_one_less_likely(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, lr=2e-3)
    samples = make_samples(learner.model)[2:4]

    def total(sample: Sample) -> float:
        with torch.no_grad():
            ids = [*sample.prompt_ids, *sample.completion_ids]
            logprobs, *_ = token_logprobs(learner.model, *pack([ids]), temperature=TEMPERATURE)
        return float(logprobs[len(sample.prompt_ids) :].sum())

    values = [[total(sample) for sample in samples]]
    for step in range(4):
        learner.step(build_batch(samples, [1.0, -1.0]), step)
        values.append([total(sample) for sample in samples])
    rewarded, punished = zip(*values, strict=True)
    assert all(later > earlier + 0.05 for earlier, later in pairwise(rewarded))
    assert all(later < earlier - 0.05 for earlier, later in pairwise(punished))


def test_kl_to_the_reference_grows_pulls_back_and_ends_with_a_refresh(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, kl_coef=0.1, lr=3e-3)
    batch = make_batch(learner.model)
    first = learner.step(batch, 0)
    second = learner.step(batch, 1)
    assert first["kl"] == pytest.approx(0.0, abs=1e-9)
    assert second["kl"] > 1e-4
    assert second["kl_loss"] == pytest.approx(0.1 * second["kl"], rel=1e-4)
    learner.refresh_reference()
    assert learner.step(batch, 2)["kl"] == pytest.approx(0.0, abs=1e-9)
    # Without any advantage the KL alone leads back to the reference.
    pulled = [learner.step(make_batch(learner.model, [0.0] * 6), step)["kl"] for step in range(3, 40)]
    assert pulled[0] > 1e-4
    assert min(pulled[-3:]) < 0.5 * pulled[0]


def test_the_reference_never_learns_and_is_absent_without_kl(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, kl_coef=0.1, lr=0.01)
    assert learner.reference is not None
    learner.step(make_batch(learner.model), 0)
    start = tiny_policy(SMALL).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in learner.reference.state_dict().items())
    assert not any(parameter.requires_grad for parameter in learner.reference.parameters())
    without = make_learner(tmp_path)
    assert without.reference is None
    assert "kl" not in without.step(make_batch(without.model), 0)
    without.refresh_reference()
    assert without.state_dict()["reference"] is None


def test_later_minibatches_are_off_policy_and_clip(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, num_minibatches=3, lr=0.03)
    metrics = learner.step(make_batch(learner.model), 0)
    assert metrics["clip_fraction"] > 0
    assert metrics["clip_fraction"] == pytest.approx(metrics["clip_fraction_low"] + metrics["clip_fraction_high"])
    assert metrics["ratio_mean"] != pytest.approx(1.0, abs=1e-3)
    assert metrics["logprob_gap_max"] < 1e-5  # old log-probabilities are of the policy before the first minibatch
    assert learner.num_optimizer_steps == 3


def test_metrics_are_means_over_completion_tokens(tmp_path: Path) -> None:
    learner = make_learner(tmp_path)
    model = tiny_policy(SMALL)
    samples = make_samples(model)
    with torch.no_grad():
        tables = [
            (packed_logits(model, [[*s.prompt_ids, *s.completion_ids]])[len(s.prompt_ids) - 1 : -1] / TEMPERATURE)
            for s in samples
        ]
    entropies = torch.cat([torch.distributions.Categorical(logits=table).entropy() for table in tables])
    shifted = [dataclasses.replace(s, rollout_logprobs=s.rollout_logprobs - 0.25) for s in samples]
    metrics = learner.step(build_batch(shifted, ADVANTAGES), 0)
    assert metrics["entropy"] == pytest.approx(float(entropies.mean()), rel=1e-5)
    assert metrics["logprob_gap_mean"] == pytest.approx(0.25, rel=1e-4)
    assert metrics["logprob_gap_max"] == pytest.approx(0.25, rel=1e-4)
    token_mean = sum(a * n for a, n in zip(ADVANTAGES, COMPLETIONS, strict=True)) / sum(COMPLETIONS)
    assert metrics["policy_loss"] == pytest.approx(-token_mean, rel=1e-5)  # the ratio is 1
    assert metrics["loss"] == pytest.approx(metrics["policy_loss"])


def test_the_rate_warms_up_and_scales_by_layer_group(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, lr=1e-3, warmup_steps=4, lr_scale={"norms": 10.0, "embedding": 0.0})
    before = weights_of(learner)
    batch = make_batch(learner.model)
    assert learner.step(batch, 0)["lr"] == pytest.approx(2.5e-4)
    # AdamW's first step moves by the learning rate wherever the gradient is not tiny.
    moves = {name: float((p.detach() - before[name]).abs().max()) for name, p in learner.model.named_parameters()}
    assert moves["model.norm.weight"] == pytest.approx(2.5e-3, rel=1e-2)
    assert moves["lm_head.weight"] == pytest.approx(2.5e-4, rel=1e-2)
    assert moves["model.embed_tokens.weight"] == 0
    for step, factor in enumerate((0.5, 0.75, 1.0, 1.0), start=1):
        rates = {group["name"]: group["lr"] for group in learner.optimizer.adamw.param_groups}
        assert (rates["norms"], rates["head"]) == pytest.approx((1e-2 * factor, 1e-3 * factor))
        assert learner.step(batch, step)["lr"] == pytest.approx(1e-3 * factor)


def test_gradients_are_clipped_to_their_norm(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, max_grad_norm=1e-3)
    metrics = learner.step(make_batch(learner.model), 0)
    assert metrics["grad_norm"] > 1e-2  # as it was before clipping
    norm = torch.stack([p.grad.norm() for p in learner.model.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_a_resumed_learner_takes_the_same_next_step_to_the_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "num_minibatches": 2,
        "warmup_steps": 9,
        "weight_decay": 0.01,
        "kl_coef": 0.1,
        "algorithm": {"entropy_target": 4.0, "entropy_coef": 0.001},
    }
    learner = make_learner(tmp_path, **options)
    for step in range(2):
        learner.step(make_batch(tiny_policy(SMALL), seed=step), step)
    learner.refresh_reference()
    learner.step(make_batch(tiny_policy(SMALL), seed=2), 2)
    file = io.BytesIO()
    torch.save({"model": learner.model.state_dict(), "learner": learner.state_dict()}, file)
    expected = learner.step(make_batch(tiny_policy(SMALL), seed=3), 3)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    model = tiny_policy(SMALL, seed=9)
    model.load_state_dict(state["model"])
    resumed = make_learner(tmp_path, model, **options)
    resumed.load_state_dict(state["learner"])
    assert resumed.step(make_batch(tiny_policy(SMALL), seed=3), 3) == expected
    for name, value in weights_of(learner).items():
        assert torch.equal(value, weights_of(resumed)[name]), name
    assert resumed.num_optimizer_steps == learner.num_optimizer_steps == 8
    assert resumed.entropy == learner.entropy
    assert resumed.entropy.coef > 0.001


def test_without_its_state_a_resumed_learner_goes_elsewhere(tmp_path: Path) -> None:
    learner = make_learner(tmp_path)
    learner.step(make_batch(learner.model), 0)
    model = tiny_policy(SMALL)
    model.load_state_dict(learner.model.state_dict())
    forgetful = make_learner(tmp_path, model)
    batch = make_batch(tiny_policy(SMALL), seed=1)
    learner.step(batch, 1)
    forgetful.step(batch, 1)
    assert largest_move(forgetful, weights_of(learner)) > 1e-4


def test_a_loss_that_is_not_finite_is_skipped_and_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, kl_coef=0.1, num_minibatches=2, max_skipped_steps=5)
    batch = make_batch(tiny_policy(SMALL))
    assert learner.reference is not None
    learner.reference.lm_head.weight.data[0, 0] = float("nan")
    before = weights_of(learner)
    assert learner.step(batch, 0)["skipped"] == 2
    assert learner.step(batch, 1)["skipped"] == 2
    assert all(torch.equal(value, before[name]) for name, value in learner.model.named_parameters())
    assert learner.skipped_in_a_row == 4
    assert not learner.bad_batch_path.exists()
    learner.refresh_reference()
    metrics = learner.step(batch, 2)
    assert metrics["skipped"] == 0
    assert metrics["loss"] == metrics["loss"]
    assert learner.skipped_in_a_row == 0
    assert 0 < largest_move(learner, before) < 0.1


def test_too_many_bad_losses_in_a_row_stop_the_run_and_leave_the_batch(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, kl_coef=0.1, max_skipped_steps=3)
    batch = make_batch(tiny_policy(SMALL))
    assert learner.reference is not None
    learner.reference.lm_head.weight.data.fill_(float("nan"))
    before = weights_of(learner)
    learner.step(batch, 0)
    learner.step(batch, 1)
    with pytest.raises(NonFiniteLossError, match=r"3 optimizer steps in a row.*loss nan.*bad/batch\.pt"):
        learner.step(batch, 2)
    assert all(torch.equal(value, before[name]) for name, value in learner.model.named_parameters())
    saved = torch.load(learner.bad_batch_path, weights_only=True)
    assert saved.keys() == {field.name for field in dataclasses.fields(Batch)}
    assert sorted(saved["sequence_index"].tolist()) == list(range(6))
    order = saved["sequence_index"].argsort().tolist()
    lengths = saved["cu_seqlens"].diff().long()
    parts = saved["input_ids"].split(lengths.tolist())
    assert torch.equal(torch.cat([parts[place] for place in order]), batch.input_ids)
    assert saved["ref_logprobs"].isnan().any()


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is_finite(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, max_skipped_steps=2)
    handle = learner.model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
    before = weights_of(learner)
    metrics = learner.step(make_batch(tiny_policy(SMALL)), 0)
    assert metrics["skipped"] == 1
    assert metrics["loss"] == metrics["loss"]
    assert all(torch.equal(value, before[name]) for name, value in learner.model.named_parameters())
    handle.remove()
    assert learner.step(make_batch(tiny_policy(SMALL)), 1)["skipped"] == 0
    assert learner.skipped_in_a_row == 0


def test_a_sample_longer_than_the_memory_allows_is_named(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, max_tokens_per_microbatch=10)
    with pytest.raises(UserError, match=r"max_tokens_per_microbatch = 10 is below the 11 tokens of sample"):
        learner.step(make_batch(learner.model), 0)


def test_what_filtering_left_is_split_into_no_more_minibatches_than_samples(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, num_minibatches=7)
    assert learner.step(make_batch(learner.model), 0)["num_optimizer_steps"] == 6
    assert learner.num_optimizer_steps == 6


def test_the_callers_batch_is_left_as_it_was(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, kl_coef=0.1, num_minibatches=2)
    batch, same = make_batch(tiny_policy(SMALL)), make_batch(tiny_policy(SMALL))
    learner.step(batch, 0)
    for field in dataclasses.fields(Batch):
        ours, theirs = getattr(batch, field.name), getattr(same, field.name)
        assert ours is theirs is None or torch.equal(ours, theirs), field.name


def with_routing(samples: list[Sample], shift: int) -> list[Sample]:
    """The samples with an engine's choices that no router would make, and none for the last token."""
    top_k = torch.arange(SMALL.num_experts_per_tok).numpy()
    routed = []
    for sample in samples:
        length = len(sample.prompt_ids) + len(sample.completion_ids)
        chosen = (top_k + shift)[None, None].repeat(length, 0).repeat(SMALL.num_moe_layers, 1) % SMALL.n_routed_experts
        chosen[-1] = -1
        routed.append(dataclasses.replace(sample, routed_experts=chosen))
    return routed


@pytest.mark.parametrize("replay", [True, False])
def test_replayed_experts_are_those_that_learn(tmp_path: Path, replay: bool) -> None:
    model = tiny_policy(SMALL)
    batch = build_batch(with_routing(make_samples(model), 2), ADVANTAGES)
    learner = Learner(
        model,
        LearnerConfig(lr=1e-3, max_tokens_per_microbatch=13),
        AlgorithmConfig(kl_coef=0.0, routing_replay=replay),
        temperature=TEMPERATURE,
        seed=3,
        bad_batch_path=tmp_path / "batch.pt",
    )
    metrics = learner.step(batch, 0)
    gradient = learner.model.get_parameter("model.layers.1.mlp.experts.down_proj").grad
    assert gradient is not None
    idle = gradient.flatten(1).abs().amax(1) == 0
    expected = torch.tensor([expert not in (2, 3, 4) for expert in range(SMALL.n_routed_experts)])
    # The last token of each sequence chooses by itself, but nothing is predicted from it.
    assert torch.equal(idle, expected) == replay
    assert (metrics["logprob_gap_max"] > 1e-3) == replay  # the samples were not made with these experts


def test_routing_of_some_samples_only_is_refused() -> None:
    samples = make_samples(tiny_policy(SMALL))
    mixed = [with_routing(samples, 0)[0], *samples[1:]]
    with pytest.raises(UserError, match=r"sample 0 of task toy/1 has .* routed_experts of none"):
        build_batch(mixed, ADVANTAGES)


@pytest.mark.parametrize("max_tokens", [8192, 13])
def test_drafts_learn_without_moving_the_policy(tmp_path: Path, max_tokens: int) -> None:
    deep = dataclasses.replace(SMALL, num_nextn_predict_layers=2)
    zeros = (0.0,) * len(ADVANTAGES)  # no policy gradient at all
    learner = make_learner(
        tmp_path,
        tiny_policy(deep),
        mtp_loss_weight=0.3,
        max_tokens_per_microbatch=max_tokens,
        max_grad_norm=NO_CLIPPING,
    )
    learner.step(make_batch(tiny_policy(deep), zeros), 0)
    for name, parameter in learner.model.named_parameters():
        moves = name.startswith(("model.layers.2.", "model.layers.3."))
        largest = 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
        assert (largest > 0) == moves, name
    by_hand = tiny_policy(deep)
    said = [
        token_logprobs(by_hand, *pack([[*s.prompt_ids, *s.completion_ids]]), temperature=TEMPERATURE, mtp="detached")
        for s in make_samples(by_hand)
    ]
    loss = torch.zeros(())
    for depth in range(2):
        places = [range(max(p, depth + 2), p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        terms = [one.mtp_logprobs[depth][list(own)].sum() for one, own in zip(said, places, strict=True)]
        loss = loss - 0.3 / 2 * torch.stack(terms).sum() / sum(len(own) for own in places)
    loss.backward()
    for name, parameter in learner.model.named_parameters():
        if name.startswith("model.layers.2.") and "mlp.experts" not in name:
            expected = by_hand.get_parameter(name).grad
            assert parameter.grad is not None
            assert expected is not None
            assert torch.allclose(parameter.grad, expected, atol=1e-6), name


@pytest.mark.parametrize("max_tokens", [8192, 13])
def test_the_balance_loss_does_not_depend_on_the_micro_batches(tmp_path: Path, max_tokens: int) -> None:
    zeros = (0.0,) * len(ADVANTAGES)
    learner = make_learner(tmp_path, balance_alpha=0.5, max_tokens_per_microbatch=max_tokens, max_grad_norm=NO_CLIPPING)
    metrics = learner.step(make_batch(tiny_policy(SMALL), zeros), 0)
    by_hand = tiny_policy(SMALL)
    sequences = [[*s.prompt_ids, *s.completion_ids] for s in make_samples(by_hand)]
    (0.5 * by_hand(*pack(sequences), return_balance_loss=True).balance_loss.mean()).backward()
    name = "model.layers.1.mlp.gate.weight"
    expected, got = by_hand.get_parameter(name).grad, learner.model.get_parameter(name).grad
    assert expected is not None
    assert got is not None
    assert expected.abs().max() > 0
    assert torch.allclose(got, expected, atol=1e-6)
    assert metrics["max_violation"] == metrics["max_violation/layer_1"] > 0
