"""A policy with precision = "fp8": what of it is FP8, that all ways of computing agree, and that it learns as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from policy.config import PolicyConfig, PolicyConfigError, Precision
from policy.deepseek import DeepseekPolicy, Experts, Packing
from policy.expert_parallel import ParallelExperts
from policy.fp8_format import is_quantised
from policy.kernels import fp8_experts
from policy.packing import layout
from policy.parallel import parallelize
from tests.policy.builders import TINY, pack, packed_logits, random_sequences, tiny_policy

V2 = replace(TINY, topk_method="group_limited_greedy", n_group=4, topk_group=2, q_lora_rank=20, norm_topk_prob=False)
V3 = replace(TINY, n_group=4, topk_group=2, routed_scaling_factor=2.5, num_nextn_predict_layers=1)
SEQUENCES = random_sequences([9, 4, 7, 1])
TRAINED = PolicyConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    initializer_range=0.05,
)


def fp8(config: PolicyConfig = TINY) -> DeepseekPolicy:
    return tiny_policy(replace(config, precision="fp8"))


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def gradients(model: DeepseekPolicy, mtp: bool = False) -> dict[str, Tensor]:
    """Of a sum of all outputs, by name; the model forgets them."""
    output = model(*pack(SEQUENCES), mtp=mtp, head=lambda hidden, weight, depth: hidden @ weight.T)
    sum(logits.square().mean() for logits in (output.hidden, *output.mtp)).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_config_json_neither_holds_nor_needs_the_precision() -> None:
    config = replace(TINY, precision="fp8")
    assert config.to_hf_dict() == TINY.to_hf_dict()
    assert "precision" not in config.to_hf_dict()
    assert PolicyConfig.from_hf_dict(config.to_hf_dict() | {"precision": "int3"}) == TINY
    with pytest.raises(PolicyConfigError, match="precision='fp16' is not one of bf16, fp8"):
        replace(TINY, precision="fp16")  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [V2, V3])
def test_fp8_are_the_weights_that_the_release_stores_in_fp8(
    config: PolicyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = fp8(config), set()
    plain = fp8_experts.quantised_weight
    monkeypatch.setattr(
        fp8_experts, "quantised_weight", lambda w, *args, **kw: seen.add(id(w)) or plain(w, *args, **kw)
    )
    gradients(model, mtp=True)
    names = {name for name, weight in model.named_parameters() if id(weight) in seen}
    stacked = {name for name, weight in model.named_parameters() if weight.dim() == 3}
    assert names == stacked | {name for name, p in model.named_parameters() if is_quantised(name, tuple(p.shape))}
    assert list(model.state_dict()) == list(tiny_policy(config).state_dict())


@pytest.mark.parametrize("config", [TINY, V2, V3])
def test_outputs_and_gradients_are_near_those_of_the_plain_policy(config: PolicyConfig) -> None:
    model, plain = fp8(config), tiny_policy(config)
    with torch.no_grad():
        want = plain(*pack(SEQUENCES), return_routed_experts=True)
        got = model(*pack(SEQUENCES), routed_experts=want.routed_experts)
    # Three layers of products with 3.7 % noise each; another choice of experts would be ten times that.
    assert 0.01 < relative_error(got.hidden, want.hidden) < 0.12
    assert gradients(model, mtp=True).keys() == gradients(plain, mtp=True).keys()


@pytest.mark.parametrize("config", [V2, V3])
def test_routing_is_the_plain_router_s(config: PolicyConfig) -> None:
    model, plain = fp8(config), tiny_policy(config)
    x = torch.randn(50, config.hidden_size, generator=torch.Generator().manual_seed(0))
    replay = torch.full((50, config.num_experts_per_tok), -1)
    replay[3] = torch.arange(config.num_experts_per_tok)
    for layer, block in model.moe_blocks.items():
        got, want = block.gate(x, replay), plain.moe_blocks[layer].gate(x, replay)
        assert torch.equal(got.experts, want.experts)
        assert torch.equal(got.gates, want.gates)
        assert torch.equal(got.scores, want.scores)


def test_a_policy_can_change_its_precision() -> None:
    model = tiny_policy(V3)
    plain = packed_logits(model, SEQUENCES)
    model.set_precision("fp8")
    assert model.config.precision == "fp8"
    assert torch.equal(packed_logits(model, SEQUENCES), packed_logits(fp8(V3), SEQUENCES))
    model.set_precision("bf16")
    assert torch.equal(packed_logits(model, SEQUENCES), plain)


def test_recomputed_activations_give_the_same_gradients() -> None:
    model = fp8(V3)
    want = gradients(model, mtp=True)
    model.enable_activation_checkpointing()
    got = gradients(model, mtp=True)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_sequences_do_not_depend_on_what_is_packed_with_them() -> None:
    model = fp8()
    together, alone = packed_logits(model, SEQUENCES), packed_logits(model, SEQUENCES[1:2])
    # The head is a plain product, whose order of additions may depend on the number of rows.
    torch.testing.assert_close(together[9:13], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_decoding_goes_on_where_prefill_ended() -> None:
    model, plain = fp8(), tiny_policy()
    whole = model(*pack(SEQUENCES[:1]), return_routed_experts=True).hidden
    want, errors = plain(*pack(SEQUENCES[:1])).hidden, []
    for policy in (model, plain):
        cache = policy.new_cache(1, 9, torch.float32, torch.device("cpu"))
        policy.prefill(*pack([SEQUENCES[0][:6]]), cache)
        hidden = policy.decode(torch.tensor([SEQUENCES[0][6:]]), cache)[0]
        errors.append(relative_error(hidden, (whole if policy is model else want)[6:]))
    # Compressed values are not quantised when kv_b_proj is absorbed: one product of noise less in each layer.
    assert errors[0] < 0.06
    assert errors[1] < 1e-5


@contextmanager
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def test_parallel_experts_compute_in_fp8() -> None:
    experts = Experts(replace(TINY, precision="fp8"))
    generator = torch.Generator().manual_seed(0)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.2, generator=generator)
    x = torch.randn(40, TINY.hidden_size, generator=generator)
    chosen, gates = torch.rand(40, 8, generator=generator).topk(3).indices, torch.rand(40, 3, generator=generator)
    want = experts(x, gates, chosen)
    with process_group():
        parallel = ParallelExperts(experts, init_device_mesh("cpu", (1,)))
        # Gates are multiplied in behind the last product instead of before it.
        assert 0 < relative_error(parallel(x, gates, chosen), want) < 0.04
        parallel.precision = "bf16"
        assert relative_error(parallel(x, gates, chosen), want) > 0.04


def trained(model: DeepseekPolicy, num_steps: int, lr: float) -> list[float]:
    """The loss of every step of AdamW on sequences of a Markov chain."""
    model.train()
    chain = torch.Generator().manual_seed(5)
    likely = (6 * torch.rand(model.config.vocab_size, model.config.vocab_size, generator=chain)).exp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    losses, device = [], next(model.parameters()).device
    for _ in range(num_steps):
        rows = [torch.randint(model.config.vocab_size, (8,), generator=chain)]
        while len(rows) < 32:
            rows.append(torch.multinomial(likely[rows[-1]], 1, generator=chain)[:, 0])
        ids = torch.stack(rows, 1)
        ids = ids.to(device)
        _, position_ids, cu_seqlens = (part.to(device) for part in layout(torch.full((8,), 32)))
        output = model(ids.flatten(), position_ids, cu_seqlens, head=lambda hidden, weight, depth: hidden @ weight.T)
        loss = F.cross_entropy(output.hidden.unflatten(0, ids.shape)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_sharded_training_quantises_the_weights_of_each_step() -> None:
    want = trained(fp8(), 4, 1e-2)
    with process_group():
        got = trained(parallelize(fp8()), 4, 1e-2)
    assert got == pytest.approx(want, rel=1e-5)


def test_training_loses_less_than_a_quarter_of_a_percent() -> None:
    losses: dict[Precision, Tensor] = {}
    for precision in ("bf16", "fp8"):
        model = DeepseekPolicy(replace(TRAINED, precision=precision))
        model.reset_parameters(0)
        losses[precision] = torch.tensor(trained(model, 100, 3e-3))
    assert losses["bf16"][:4].mean() - losses["bf16"][-4:].mean() > 0.5  # nats: it does learn
    last = slice(75, None)
    difference = ((losses["fp8"] - losses["bf16"]) / losses["bf16"])[last]
    assert difference.abs().mean() > 0
    # arXiv 2412.19437, section 3.3: "consistently below 0.25 %".
    assert abs(difference.mean()) < 0.0025, difference


def test_packing_knows_where_sequences_end() -> None:
    _, position_ids, cu_seqlens = pack(SEQUENCES)
    assert torch.equal(Packing.of(position_ids, cu_seqlens).cu_seqlens, cu_seqlens)
