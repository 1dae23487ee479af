"""One rank of the process tests: runs every check of its world size and writes down what came of each.

`python -m tests.policy.parallel_worker RANK WORLD FOLDER`; test_parallel.py starts it and reads FOLDER/WORLD-RANK.json.
It is long because processes are slow to start: a few of them run everything.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication

from policy import optim, sharded_checkpoint
from policy.atomic import CheckpointError
from policy.auxiliary import AuxiliaryTotals, auxiliary_loss
from policy.balance import balance_experts
from policy.checkpoint_read import Target, load_weights
from policy.compiling import compile_blocks
from policy.config import PolicyConfig
from policy.deepseek import DeepseekPolicy
from policy.dense import DensePolicy
from policy.interface import Policy
from policy.logprobs import TokenLogprobs, token_logprobs
from policy.parallel import (
    ParallelismError,
    clip_grad_norm,
    global_grad_norm,
    initialise,
    materialise,
    parallelize,
    sum_over_ranks,
)
from policy.sharded_checkpoint import load_optimizer, load_sharded, save_optimizer, save_sharded, shared_atomic_folder
from policy.sharding import gathered_weights, local
from tests.policy.builders import TINY, pack, random_sequences, tiny_policy
from tests.policy.dense_builders import dense_policy

V3 = replace(TINY, num_nextn_predict_layers=2, n_group=4, topk_group=2, routed_scaling_factor=2.5)
V2 = replace(
    TINY,
    topk_method="group_limited_greedy",
    n_group=4,
    topk_group=2,
    q_lora_rank=20,
    norm_topk_prob=False,
    n_shared_experts=2,
)
# Lengths of the sequences of each rank: very different, one token, none at all; the same for any number of ranks.
LENGTHS = {1: [[9, 4, 7, 1]], 2: [[9, 4, 7], [1]], 4: [[9, 4], [], [7], [1]]}
CHECKS: dict[str, tuple[tuple[int, ...], Callable[[Path], None]]] = {}


def check(*worlds: int) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Register a check for these numbers of processes."""

    def register(function: Callable[[Path], None]) -> Callable[[Path], None]:
        CHECKS[function.__name__] = (worlds, function)
        return function

    return register


class Data:
    """Sequences of all ranks, with a weight for every token a loss is taken of."""

    def __init__(self, seed: int = 0, replay_first: bool = False, mtp: Literal[True, "detached"] = True):
        self.mtp: Literal[True, "detached"] = mtp
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        by_rank = LENGTHS[world]
        lengths = [length for some in by_rank for length in some]
        self.sequences = random_sequences(lengths, seed)
        first = sum(len(some) for some in by_rank[:rank])
        self.own = range(first, first + len(by_rank[rank]))
        self.starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        self.weights = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed + 1)) / sum(lengths)
        self.replay = None
        if replay_first:  # every token to experts 0, 1, 2 in all layers: the others are empty, and so are ranks
            self.replay = torch.arange(3).expand(sum(lengths), 2, 3).contiguous()

    def part(self, values: Tensor, some: range) -> Tensor:
        """The tokens of some sequences out of [T, ...]."""
        return values[self.starts[some.start] : self.starts[some.stop]]


def packed(sequences: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """As `pack`, also of no sequences."""
    if sequences:
        return pack(sequences)
    return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.int32)


def loss_of(model: Policy, data: Data, some: range, totals: AuxiliaryTotals) -> tuple[Tensor, TokenLogprobs]:
    """The sum over tokens of weighted log-probability and entropy, with the auxiliary losses, of some sequences."""
    experts = isinstance(model, DeepseekPolicy)
    said = token_logprobs(
        model,
        *packed([data.sequences[i] for i in some]),
        temperature=0.8,
        mtp=data.mtp if model.mtp_layers else False,
        routed_experts=None if data.replay is None else data.part(data.replay, some),
        return_routed_experts=experts,
        return_balance_loss=experts,
    )
    loss = -(data.part(data.weights, some) * (said.logprobs - 0.1 * said.entropy)).sum()
    return loss + auxiliary_loss(said, totals, mtp_loss_weight=0.3, balance_alpha=0.1), said


def totals_of(model: Policy, data: Data) -> AuxiliaryTotals:
    ids, positions, _ = pack(data.sequences)
    return AuxiliaryTotals.of(positions, torch.ones_like(ids), len(data.sequences), len(model.mtp_layers))


def whole(tensor: Tensor | None) -> Tensor:
    """torch's own way to gather a sharded tensor."""
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def close(actual: Any, expected: Any, what: str = "", tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, msg=lambda text: f"{what}: {text}")


def compare(model: Policy, reference: Policy, data: Data) -> None:
    """Loss, what was said of each token, gradients, their norm and the experts' load, against one process."""
    totals, everything = totals_of(reference, data), range(len(data.sequences))
    expected, expected_said = loss_of(reference, data, everything, totals)
    expected.backward()
    loss, said = loss_of(model, data, data.own, totals)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    close(said.logprobs, data.part(expected_said.logprobs, data.own), "logprobs")
    close(said.entropy, data.part(expected_said.entropy, data.own), "entropy")
    for ours, theirs in zip(said.mtp_logprobs, expected_said.mtp_logprobs, strict=True):
        close(ours, data.part(theirs, data.own), "mtp")
    if said.routed_experts is not None and expected_said.routed_experts is not None:
        assert torch.equal(said.routed_experts, data.part(expected_said.routed_experts, data.own))
    if said.balance_loss is not None and expected_said.balance_loss is not None:
        close(said.balance_loss, expected_said.balance_loss[data.own.start : data.own.stop], "balance loss")
    close(total, expected.detach(), "loss")
    compare_parameters(model, reference, gradients=True)
    norm = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters() if p.grad is not None])
    close(global_grad_norm(model.parameters()), norm, "norm")
    if isinstance(model, DeepseekPolicy) and isinstance(reference, DeepseekPolicy):
        loads = balance_experts(model, 0.0, sum_over_ranks).by_layer
        for layer, load in balance_experts(reference, 0.0).by_layer.items():
            assert torch.equal(loads[layer], load)
            assert load.sum() > 0


def compare_parameters(model: Policy, reference: Policy, gradients: bool = False, tolerance: float = 1e-5) -> None:
    expected = {name: p.grad if gradients else p.detach() for name, p in reference.named_parameters()}
    ours = {name: whole(p.grad if gradients else p.detach()) for name, p in model.named_parameters()}
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        close(value, expected[name], name, tolerance)


def against_one_process(config: PolicyConfig, expert_parallel: int, data: Data, recompute: bool = False) -> None:
    reference = tiny_policy(config).train()
    model = parallelize(tiny_policy(config).train(), expert_parallel=expert_parallel)
    model.enable_activation_checkpointing(recompute)
    compare(model, reference, data)


@check(2, 4)
def v3_with_mtp(_: Path) -> None:
    against_one_process(V3, 2, Data())


@check(2, 4)
def v3_recomputed_with_detached_mtp(_: Path) -> None:
    against_one_process(V3, dist.get_world_size(), Data(mtp="detached"), recompute=True)


@check(2, 4)
def v2_without_expert_parallelism(_: Path) -> None:
    against_one_process(V2, 1, Data(), recompute=True)


@check(4)
def v2_tied(_: Path) -> None:
    against_one_process(replace(V2, tie_word_embeddings=True), 2, Data())


@check(2, 4)
def empty_experts_replayed(_: Path) -> None:
    against_one_process(replace(V3, tie_word_embeddings=True), dist.get_world_size(), Data(replay_first=True))


@check(4)
def experts_cut_by_rows(_: Path) -> None:
    # 3 experts a row of 2 ranks: neither gets whole ones.
    config = replace(TINY, n_routed_experts=6)
    against_one_process(config, 2, Data())
    train_both(config, 2)


def newton_schulz(matrices: Tensor) -> Tensor:
    """`orthogonalise` in fp64: in bf16, gradients that differ in the last bit come out 0.4 % apart."""
    x = matrices.double()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.to(matrices.dtype)


class Trainer:
    """Muon on the matrices of layers and AdamW on the rest, clipped, with balanced experts and two micro-batches."""

    def __init__(self, model: DeepseekPolicy):
        self.model = model.train()
        named = list(model.named_parameters())
        matrices = {name: p for name, p in named if p.dim() > 1 and ".layers." in name and ".gate." not in name}
        self.muon = optim.Muon(matrices.values(), lr=0.02, weight_decay=0.1)
        self.adamw = torch.optim.AdamW([p for name, p in named if name not in matrices], lr=1e-3, eps=1e-6)

    def step(self, seed: int) -> None:
        data = Data(seed)
        totals = totals_of(self.model, data)
        for some in (data.own[:1], data.own[1:]):
            loss_of(self.model, data, some, totals)[0].backward()
        clip_grad_norm(self.model.parameters(), 0.05)
        self.update()
        balance_experts(self.model, 0.01, sum_over_ranks)

    def update(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optim, "orthogonalise", newton_schulz)
            for optimizer in (self.muon, self.adamw):
                optimizer.step()
                optimizer.zero_grad()


class LoneTrainer(Trainer):
    """The same in one process, on all ranks' sequences at once."""

    def step(self, seed: int) -> None:
        data = Data(seed)
        loss_of(self.model, data, range(len(data.sequences)), totals_of(self.model, data))[0].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)
        self.update()
        balance_experts(self.model, 0.01)


def train_both(config: PolicyConfig, expert_parallel: int) -> None:
    alone = LoneTrainer(tiny_policy(config))
    together = Trainer(parallelize(tiny_policy(config), expert_parallel=expert_parallel))
    for seed in range(3):
        alone.step(seed)
        together.step(seed)
    compare_parameters(together.model, alone.model)
    for name, buffer in alone.model.named_buffers():
        assert torch.equal(dict(together.model.named_buffers())[name], buffer), name


@check(4)
def muon_in_bfloat16(_: Path) -> None:
    """As it is used: given the same gradients, bit for bit the same matrices, whoever computes them."""
    for config in (TINY, replace(TINY, n_routed_experts=6)):
        alone, together = tiny_policy(config), parallelize(tiny_policy(config), expert_parallel=2)
        generator = torch.Generator().manual_seed(0)
        steps = []
        for model in (alone, together):
            steps.append(optim.Muon([p for p in model.parameters() if p.dim() > 1], lr=0.1, weight_decay=0.1))
        for p, sharded in zip(alone.parameters(), together.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            with implicit_replication():
                sharded.grad = torch.zeros_like(sharded).copy_(p.grad)
        for step in steps:
            step.step()
        compare_parameters(together, alone, tolerance=1e-7)


@check(2, 4)
def several_optimizer_steps(_: Path) -> None:
    train_both(V3, 2)


@check(2)
def saved(folder: Path) -> None:
    """What test_parallel.py and `loaded` take up again."""
    trainer = Trainer(parallelize(tiny_policy(V3), expert_parallel=2))
    trainer.step(0)
    with shared_atomic_folder(folder / "checkpoint") as temporary:
        save_sharded(trainer.model, temporary, max_shard_bytes=30_000)
        save_optimizer(trainer.model, trainer.muon, temporary / "muon")
        save_optimizer(trainer.model, trainer.adamw, temporary / "adamw")
    gathered = dict(gathered_weights(trainer.model))
    trainer.step(1)
    after = dict(gathered_weights(trainer.model))
    if dist.get_rank() == 0:
        torch.save((gathered, after), folder / "weights.pt")
    else:
        assert set(gathered.values()) == {None}


@check(4)
def loaded(folder: Path) -> None:
    """A policy that was never whole, from a checkpoint of half as many ranks; reads its own rows and no others."""
    with torch.device("meta"):
        model = DeepseekPolicy(V3)
    materialise(parallelize(model, expert_parallel=2), "cpu")
    asked: list[Target] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_checkpoint, "load_weights", lambda *args: (asked.extend(args[1]), load_weights(*args)))
        load_sharded(model, folder / "checkpoint")
    read = sum(target.into.numel() for target in asked if target.into is not None and not target.alias)
    assert read == sum(local(value).numel() for value in model.state_dict().values())
    before, after = torch.load(folder / "weights.pt")
    for name, weight in gathered_weights(model):
        assert weight is None or torch.equal(weight, before[name]), name
    trainer = Trainer(model)
    load_optimizer(model, trainer.muon, folder / "checkpoint" / "muon")
    load_optimizer(model, trainer.adamw, folder / "checkpoint" / "adamw")
    trainer.step(1)
    for name, weight in gathered_weights(model):
        if weight is not None:
            close(weight, after[name], name)


@check(2)
def failed_write(folder: Path) -> None:
    """When rank 0 can't write, every rank says so and nothing is left behind."""
    model = parallelize(tiny_policy())
    (folder / "file").write_text("not a folder") if dist.get_rank() == 0 else None
    for target in (folder / "unwritable", folder / "file"):
        own_error = "" if dist.get_rank() == 0 else "rank 0"
        with (
            pytest.raises((CheckpointError, OSError), match=own_error),
            shared_atomic_folder(target) as temporary,
        ):
            save_sharded(model, temporary / "missing")
    assert not (folder / "unwritable").exists()


@check(2)
def initialised_on_meta(_: Path) -> None:
    with torch.device("meta"):
        model = DeepseekPolicy(V3)
    materialise(parallelize(model, expert_parallel=2), "cpu")
    initialise(model, 5)
    reference = DeepseekPolicy(V3)
    reference.reset_parameters(5)
    for name, value in model.state_dict().items():
        assert torch.equal(whole(value), reference.state_dict()[name]), name
    held = sum(local(p).numel() for p in model.parameters())
    assert held < 0.52 * sum(p.numel() for p in reference.parameters())


@check(2)
def half_precision(_: Path) -> None:
    """Products in bf16, angles, gradients and parameters in fp32; weights are sharded again after a pass without backward."""
    reference = tiny_policy()
    model = parallelize(tiny_policy(), expert_parallel=2, precision=torch.bfloat16)
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    model.main_layers[1].register_forward_pre_hook(lambda _, args: seen.append((args[0].dtype, args[1].dtype)))
    data, totals = Data(), totals_of(reference, Data())
    with torch.no_grad():
        said = loss_of(model, data, data.own, totals)[1]
        expected = loss_of(reference, data, range(len(data.sequences)), totals)[1]
    assert seen == [(torch.bfloat16, torch.float32)]
    assert all(isinstance(p, DTensor) for p in model.parameters())
    close(said.logprobs, data.part(expected.logprobs, data.own), "bf16", 0.1)
    loss_of(model, data, data.own, totals)[0].backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@check(2)
def compiled(_: Path) -> None:
    config = replace(TINY, num_hidden_layers=2, num_nextn_predict_layers=1)
    alone, together = tiny_policy(config).train(), parallelize(tiny_policy(config).train(), expert_parallel=2)
    together.enable_activation_checkpointing()
    compile_blocks(together, backend="eager")  # traced and guarded; code for the graphs would take minutes
    compare(together, alone, Data())


@check(2)
def dense_models(_: Path) -> None:
    """Models of transformers, one with a tied embedding, recomputed."""
    for name in ("llama", "qwen3_tied"):
        alone, together = dense_policy(name).train(), parallelize(dense_policy(name).train())
        together.enable_activation_checkpointing()
        compare(together, alone, Data())
    with torch.device("meta"):
        built = DensePolicy(dense_policy("llama").config)
    materialise(parallelize(built.train()), "cpu")
    initialise(built, 5)
    drawn = dense_policy("llama").train()
    drawn.reset_parameters(5)
    compare(built, drawn, Data())  # without its rotary frequencies it would not know one position from another
    with pytest.raises(ParallelismError, match="no experts"):
        parallelize(dense_policy("llama"), expert_parallel=2)


@check(2)
def refused(_: Path) -> None:
    """Sizes that do not divide are named before anything is spread."""
    for config, expert_parallel, words in (
        (TINY, 3, "expert_parallel=3 does not divide the 2 processes"),
        (replace(TINY, n_routed_experts=7), 2, "does not divide n_routed_experts=7"),
        (replace(TINY, first_k_dense_replace=3), 2, "no experts"),
    ):
        model = tiny_policy(config)
        with pytest.raises(ParallelismError, match=words):
            parallelize(model, expert_parallel=expert_parallel)
        assert not any(isinstance(p, DTensor) for p in model.parameters())


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init-{world}", rank=rank, world_size=world, timeout=timedelta(seconds=40)
    )
    only = sys.argv[4:]
    results: dict[str, str | None] = {}
    for name, (worlds, function) in CHECKS.items():
        if world not in worlds or (only and name not in only):
            continue
        try:
            function(folder)
            results[name] = None
        except Exception:  # noqa: BLE001 (its text is the result)
            results[name] = traceback.format_exc()
        (folder / f"{world}-{rank}.json").write_text(json.dumps(results))
        if results[name] is not None:  # the ranks may be at different places now: the others time out
            sys.exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
