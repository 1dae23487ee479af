"""The memory to train a model on each rank, by precision and sharding, from its account."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from policy.account import ModelAccount, Parameters


class TrainingMemoryError(ValueError):
    """A precision that is not known, or a split of a model over ranks that doesn't come out even."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Bytes per parameter in training with AdamW, by what they are kept for.

    `wide_weights` are those that stay out of the narrow type (embedding, head, router, vectors); `working_gradients` is the
    type in which backward produces them, before they are summed in `gradients`.
    """

    weights: float
    wide_weights: float
    master: float
    gradients: float
    moments: float
    working_gradients: float


PRECISIONS = {
    "fp32": Precision(weights=4, wide_weights=4, master=0, gradients=4, moments=8, working_gradients=4),
    "bf16": Precision(weights=2, wide_weights=2, master=4, gradients=4, moments=8, working_gradients=2),
    # As V3 was trained (section 3.3): a scale in fp32 per 128 x 128 block, both of AdamW's moments in bf16.
    "fp8": Precision(weights=1 + 4 / 128**2, wide_weights=2, master=4, gradients=4, moments=4, working_gradients=2),
}


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes on each rank: its shares of what is kept, and the largest block that is whole while it is computed."""

    weights: int
    master_weights: int
    gradients: int
    optimizer_states: int
    gathered: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


def training_memory(
    account: ModelAccount, precision: str = "bf16", num_ranks: int = 1, expert_parallel: int = 1
) -> TrainingMemory:
    """Memory to train with AdamW, everything sharded over all ranks (FSDP), experts first split over `expert_parallel` of them.

    Layers of multi-token prediction are trained too. A split that doesn't come out even is an TrainingMemoryError.
    """
    if precision not in PRECISIONS:
        raise TrainingMemoryError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if num_ranks < 1 or expert_parallel < 1 or num_ranks % expert_parallel:
        raise TrainingMemoryError(f"expert_parallel={expert_parallel} does not divide the number of ranks, {num_ranks}")
    if expert_parallel > 1 and (not account.num_experts or account.num_experts % expert_parallel):
        raise TrainingMemoryError(f"{account.num_experts} experts can't be split evenly over {expert_parallel} ranks")
    kind = PRECISIONS[precision]
    whole = account.parameters + account.mtp
    gathered = 0.0
    if num_ranks > 1:
        replicas = num_ranks // expert_parallel
        blocks = (account.root, *account.layers, *account.mtp_layers)
        gathered = max(_gathered_bytes(block, kind, expert_parallel, replicas) for block in blocks)
    return TrainingMemory(
        weights=_share(_weight_bytes(whole, kind), num_ranks),
        master_weights=_share(whole.total * kind.master, num_ranks),
        gradients=_share(whole.total * kind.gradients, num_ranks),
        optimizer_states=_share(whole.total * kind.moments, num_ranks),
        gathered=_share(gathered, 1),
    )


def _weight_bytes(part: Parameters, kind: Precision) -> float:
    wide = part.embedding + part.head + part.router + part.vectors
    return (part.total - wide) * kind.weights + wide * kind.wide_weights


def _gathered_bytes(block: Parameters, kind: Precision, expert_parallel: int, replicas: int) -> float:
    """Weights and fresh gradients of one block while they are whole; experts that no other rank shares are so anyway."""
    experts = block.routed_experts / expert_parallel if replicas > 1 else 0.0
    others = block.total - block.routed_experts
    rest = Parameters(**{**asdict(block), "routed_experts": 0})
    return _weight_bytes(rest, kind) + experts * kind.weights + (others + experts) * kind.working_gradients


def _share(num_bytes: float, num_ranks: int) -> int:
    return -(-int(num_bytes) // num_ranks)
