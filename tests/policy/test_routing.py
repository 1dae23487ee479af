"""The routers' choices, their replay, and balance without and with an auxiliary loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from policy.balance import balance_experts
from policy.deepseek import DeepseekPolicy, MixtureOfExperts, Packing, Router, Routing, sequence_balance_loss
from policy.logprobs import token_logprobs
from tests.policy.builders import TINY, pack, packed_logits, random_sequences, tiny_policy

LENGTHS = (17, 1, 9, 30)


def test_the_loss_free_bias_chooses_but_does_not_weigh() -> None:
    gate = tiny_policy().moe_blocks[1].gate
    x = torch.randn(50, TINY.hidden_size, generator=torch.Generator().manual_seed(0))
    gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9.0, 9.0, 0, 0, 0, 0, 0]))
    routing = gate(x)
    assert routing.experts.sort(-1).values.eq(torch.arange(3)).all()
    scores = (x @ gate.weight[:3].T).sigmoid()
    expected = (scores / scores.sum(-1, keepdim=True)).gather(1, routing.experts)
    assert torch.allclose(routing.gates, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "expected"),
    # Groups {0, 1}, {2, 3}, {4, 5}: the best single score is in the first, the best pair in the second.
    [("noaux_tc", {2, 3}), ("group_limited_greedy", {0, 1})],
)
def test_groups_are_chosen_by_their_top_two_in_v3_and_by_their_best_in_v2(method: str, expected: set[int]) -> None:
    config = replace(TINY, n_routed_experts=6, num_experts_per_tok=2, n_group=3, topk_group=1, topk_method=method)
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.6, 0.2, 0.3]])
    assert set(Router(config).choose(scores)[0].tolist()) == expected


def test_v2s_softmax_gates_are_scaled_and_not_normalised() -> None:
    config = replace(TINY, topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=16.0)
    gate = tiny_policy(config).moe_blocks[1].gate
    x = torch.randn(20, TINY.hidden_size, generator=torch.Generator().manual_seed(0))
    best = (x @ gate.weight.T).softmax(-1).topk(3, -1)
    routing = gate(x)
    assert torch.equal(routing.experts, best.indices)
    assert torch.allclose(routing.gates, best.values * 16.0, atol=1e-5)


@torch.no_grad()
def test_replaying_ones_own_choices_changes_nothing() -> None:
    model = tiny_policy()
    packed = pack(random_sequences(LENGTHS))
    first = model(*packed, return_routed_experts=True)
    assert first.routed_experts.shape == (sum(LENGTHS), TINY.num_moe_layers, TINY.num_experts_per_tok)
    again = model(*packed, routed_experts=first.routed_experts, return_routed_experts=True)
    assert torch.equal(again.hidden, first.hidden)
    assert torch.equal(again.routed_experts, first.routed_experts)


def test_replayed_experts_are_used_with_todays_gates() -> None:
    model = tiny_policy()
    packed = pack(random_sequences(LENGTHS))
    chosen = model(*packed, return_routed_experts=True).routed_experts
    replay = (chosen + 3) % TINY.n_routed_experts
    replay[5] = -1  # this token chooses by itself
    out = model(*packed, routed_experts=replay, return_routed_experts=True)
    assert torch.equal(out.routed_experts[:5], replay[:5])
    assert torch.equal(out.routed_experts[6:], replay[6:])
    assert torch.equal(out.routed_experts[5, 0], chosen[5, 0])
    gate = model.moe_blocks[1].gate
    x = torch.randn(4, TINY.hidden_size, generator=torch.Generator().manual_seed(0))
    forced = torch.tensor([[0, 1, 2]] * 4)
    routing = gate(x, forced)
    scores = (x @ gate.weight.T).sigmoid()[:, :3]
    assert torch.allclose(routing.gates, scores / scores.sum(-1, keepdim=True), atol=1e-6)
    routing.gates[:, 0].sum().backward()
    assert gate.weight.grad is not None
    assert gate.weight.grad[0].abs().max() > 0


@torch.no_grad()
def test_replay_removes_the_gap_that_flipped_choices_make_in_bfloat16() -> None:
    """The same tokens in bf16 and in fp32: near ties fall the other way, and single tokens move by tenths of nats."""
    config = replace(TINY, n_routed_experts=16, num_hidden_layers=5)
    exact = tiny_policy(config)
    rough = tiny_policy(config)
    for parameter in rough.parameters():
        parameter.data = parameter.data.bfloat16()
    packed = pack(random_sequences([60] * 12))
    sampled = token_logprobs(rough, *packed, return_routed_experts=True)
    free = token_logprobs(exact, *packed, return_routed_experts=True)
    replayed = token_logprobs(exact, *packed, routed_experts=sampled.routed_experts)
    assert sampled.routed_experts is not None
    assert free.routed_experts is not None
    flipped = (sampled.routed_experts.sort(-1).values != free.routed_experts.sort(-1).values).any(-1).any(-1)
    assert 0.02 < flipped.float().mean() < 0.9
    gap_free, gap_replayed = ((said.logprobs - sampled.logprobs).abs() for said in (free, replayed))
    assert gap_free.max() > 0.2
    behind = flipped.roll(1)  # a token's log-probability comes from the hidden state before it
    assert gap_free[behind].mean() > 2 * gap_free[~behind].mean()
    # With replay, tokens whose choices would have flipped are as close as all others: what is left is rounding.
    assert gap_replayed.max() < 0.25 * gap_free.max()
    assert gap_replayed[behind].mean() < 1.5 * gap_replayed[~behind].mean()


def test_activation_checkpointing_gives_the_same_gradients_and_counts_tokens_once() -> None:
    config = replace(TINY, num_nextn_predict_layers=1)
    gradients, loads = [], []
    for recompute in (False, True):
        model = tiny_policy(config).train()
        model.enable_activation_checkpointing(recompute)
        said = token_logprobs(model, *pack(random_sequences(LENGTHS)), mtp=True, return_balance_loss=True)
        assert said.balance_loss is not None
        (said.logprobs.sum() + said.mtp_logprobs[0].sum() + said.balance_loss.sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        loads.append(model.moe_blocks[2].load.clone())
    assert loads[0].sum() == sum(LENGTHS) * TINY.num_experts_per_tok
    assert torch.equal(*loads)
    for name, grad in gradients[0].items():
        assert grad is not None, name
        assert torch.allclose(grad, gradients[1][name], atol=1e-6), name


def one_sequence_at_a_time(routing: Routing, lengths: tuple[int, ...]) -> Tensor:
    """The balance loss by the paper's sums (equations 17-20), in loops."""
    losses, start = [], 0
    num_experts, top_k = routing.scores.shape[1], routing.experts.shape[1]
    for length in lengths:
        own = slice(start, start + length)
        start += length
        share = routing.scores[own] / routing.scores[own].sum(-1, keepdim=True)
        total = torch.tensor(0.0)
        for expert in range(num_experts):
            chosen = (routing.experts[own] == expert).sum()
            total = total + num_experts / (top_k * length) * chosen * share[:, expert].mean()
        losses.append(total)
    return torch.stack(losses)


def test_the_sequence_balance_loss_is_the_papers() -> None:
    gate = tiny_policy().moe_blocks[1].gate
    routing = gate(torch.randn(sum(LENGTHS), TINY.hidden_size, generator=torch.Generator().manual_seed(0)))
    _, position_ids, cu_seqlens = pack(random_sequences(LENGTHS))
    got = sequence_balance_loss(routing, Packing.of(position_ids, cu_seqlens))
    assert torch.allclose(got, one_sequence_at_a_time(routing, LENGTHS), atol=1e-5)


def test_the_models_balance_loss_is_summed_over_layers_and_kept_apart_by_sequence() -> None:
    model = tiny_policy()
    sequences = random_sequences(LENGTHS)
    together = model(*pack(sequences), return_balance_loss=True).balance_loss
    alone = torch.cat([model(*pack([sequence]), return_balance_loss=True).balance_loss for sequence in sequences])
    assert torch.allclose(together, alone, atol=1e-5)
    together.sum().backward()
    router = model.moe_blocks[1].gate.weight.grad
    assert router is not None
    assert router.abs().max() > 0


def test_balancing_moves_biases_against_the_load_and_forgets_it() -> None:
    model = tiny_policy().train()
    packed_logits(model, random_sequences([40]))
    block = model.moe_blocks[2]
    load, before = block.load.clone(), block.gate.e_score_correction_bias.clone()
    assert load.sum() == 40 * TINY.num_experts_per_tok
    measured = balance_experts(model, 0.01)
    moved = block.gate.e_score_correction_bias - before
    assert torch.allclose(moved, 0.01 * (load.mean() - load).sign(), atol=1e-7)
    assert torch.equal(measured.by_layer[2], load)
    metrics = measured.metrics()
    assert metrics["max_violation/layer_2"] == pytest.approx(float(load.max() / load.mean() - 1))
    assert metrics["max_violation"] == max(metrics["max_violation/layer_1"], metrics["max_violation/layer_2"])
    assert block.load.sum() == 0
    packed_logits(model.eval(), random_sequences([40]))
    assert block.load.sum() == 0


def test_loads_of_all_ranks_are_added_before_the_bias_moves() -> None:
    model, doubled = tiny_policy().train(), tiny_policy().train()
    packed_logits(model, random_sequences([40]))
    packed_logits(doubled, random_sequences([40]))
    alone = balance_experts(model, 0.0).by_layer[1]
    others = torch.zeros(TINY.n_routed_experts)
    others[0] = 1000.0  # on another rank, everything went to expert 0
    before = doubled.moe_blocks[1].gate.e_score_correction_bias.clone()
    load = balance_experts(doubled, 0.01, all_reduce=lambda tensor: tensor.add_(others)).by_layer[1]
    assert torch.equal(load, alone + others)
    assert doubled.moe_blocks[1].gate.e_score_correction_bias[0] < before[0]


def test_v2s_routers_have_no_bias_to_move() -> None:
    model = tiny_policy(replace(TINY, topk_method="greedy", norm_topk_prob=False)).train()
    packed_logits(model, random_sequences([40]))
    with pytest.raises(ValueError, match="moves routing biases, which the routers"):
        balance_experts(model, 0.001)
    assert balance_experts(model, 0.0).by_layer[1].sum() == 40 * TINY.num_experts_per_tok


def skewed_tokens(gate: Router, num_tokens: int, step: int) -> Tensor:
    """Hidden states of which 80 % point at the first two experts."""
    noise = torch.randn(num_tokens, TINY.hidden_size, generator=torch.Generator().manual_seed(step))
    towards = gate.weight[:2].detach().sum(0)
    skewed = (torch.arange(num_tokens) % 10 < 8)[:, None] * towards / towards.norm() * 6
    return 0.5 * noise + skewed


@torch.no_grad()
def test_a_skewed_task_is_rebalanced_by_the_bias_alone() -> None:
    """80 % of the tokens go to two of eight experts; the weights never move, only the biases do."""
    model: DeepseekPolicy = tiny_policy(replace(TINY, num_experts_per_tok=2)).train()
    block = model.moe_blocks[1]
    assert isinstance(block, MixtureOfExperts)
    block.gate.e_score_correction_bias.zero_()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    history = []
    for step in range(600):
        experts = block.gate(skewed_tokens(block.gate, 512, step)).experts
        block.load += torch.bincount(experts.flatten(), minlength=8)
        if step == 0:
            assert block.load[:2].sum() / block.load.sum() > 0.8
        history.append(balance_experts(model, 0.003).max_violation()[1])
    assert history[0] > 2.0  # the busiest expert had more than three times its share
    assert max(history[-20:]) < 0.5
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
