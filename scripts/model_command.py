"""`groupzero model`: what a config or checkpoint costs, from its shape alone; no weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from policy.account import (
    ModelAccount,
    account_of,
    decoding_flops,
    forward_flops,
)
from policy.config import PolicyConfigError
from policy.training_memory import TrainingMemoryError, training_memory
from rollout.errors import UserError
from scripts.model_target import find_config

CACHE_BYTES = 2
# DeepSeek 67B (arXiv 2401.02954, table 2): 95 layers, 8 key-value heads of 128, cached in 16 bits. V2 was deployed with
# 6 bits per cached value on average (arXiv 2405.04434, section 3.2.3).
DENSE_PREDECESSOR = {"params": 67_425_001_472, "cached_values": 95 * 2 * 8 * 128, "cache_bits": 16, "v2_cache_bits": 6}


def run_model(
    target: str,
    *,
    as_json: bool = False,
    context_tokens: int | None = None,
    precision: str = "bf16",
    num_ranks: int = 1,
    expert_parallel: int = 1,
) -> None:
    """Describe a model on the terminal, or as JSON."""
    description = describe_model(
        target,
        context_tokens=context_tokens,
        precision=precision,
        num_ranks=num_ranks,
        expert_parallel=expert_parallel,
    )
    if as_json:
        print(json.dumps(description, indent=2))
    else:
        print_description(description)


def describe_model(
    target: str | Path,
    *,
    context_tokens: int | None = None,
    precision: str = "bf16",
    num_ranks: int = 1,
    expert_parallel: int = 1,
) -> dict[str, Any]:
    """All figures of the model that `target` names, ready for JSON; counts are whole numbers, sizes are in bytes.

    `context_tokens` is 4096, or what the model takes if that is less, unless given. A target that is no model, and a
    split that doesn't come out even, are a UserError.
    """
    source, config = find_config(target)
    if context_tokens is None:
        context_tokens = min(4096, config.max_position_embeddings)
    if context_tokens < 1:
        raise UserError(f"context tokens must be at least 1, not {context_tokens}")
    try:
        account = account_of(config)
        memory = training_memory(account, precision, num_ranks, expert_parallel)
    except (TrainingMemoryError, PolicyConfigError) as error:
        raise UserError(f"{source}: {error}") from error
    parameters, flops = account.parameters, forward_flops(account, context_tokens)
    roles = {name: count for name, count in vars(parameters).items() if count and name != "active_experts"}
    return {
        "source": source,
        "model_type": account.model_type,
        "total_params": parameters.total,
        "active_params": parameters.active,
        "mtp_params": account.mtp.total,
        "mtp_active_params": account.mtp.active,
        "params_by_role": roles,
        "kv_cache_values_per_token": account.cached_values,
        "kv_cache_bytes_per_token": account.cached_values * CACHE_BYTES,
        "mha_kv_cache_bytes_per_token": account.multi_head_values * CACHE_BYTES,
        "kv_cache_saving": 1 - account.cached_values / account.multi_head_values,
        "kv_cache_bytes_per_sequence": account.cached_values * CACHE_BYTES * context_tokens,
        **_against_predecessor(account),
        "context_tokens": context_tokens,
        "flops_per_token": flops,
        "attention_flops_per_token": flops - 2 * parameters.matrices,
        "training_flops_per_token": 3 * flops,
        "decoding_flops_per_token": decoding_flops(account, context_tokens),
        "training_memory": {
            "precision": precision,
            "num_ranks": num_ranks,
            "expert_parallel": expert_parallel,
            **{f"{name}_bytes": size for name, size in vars(memory).items()},
            "total_bytes_per_rank": memory.total,
        },
        "assumptions": list(_assumptions(account, context_tokens, precision, num_ranks)),
    }


def _against_predecessor(account: ModelAccount) -> dict[str, float]:
    """Latent attention against the dense model that V2 replaced; a comparison for models that are no smaller than it."""
    known = DENSE_PREDECESSOR
    if not account.attention.is_latent or account.parameters.total < known["params"]:
        return {}
    share = account.cached_values / known["cached_values"]
    return {
        "deepseek_67b_kv_cache_bytes_per_token": known["cached_values"] * known["cache_bits"] // 8,
        "kv_cache_saving_against_deepseek_67b": 1 - share,
        "kv_cache_saving_against_deepseek_67b_at_6_bits": 1 - share * known["v2_cache_bits"] / known["cache_bits"],
    }


_KEPT = {
    "fp32": "weights, gradients and both of AdamW's moments in fp32: 16 bytes per parameter",
    "bf16": "weights in bf16; master weights, gradients and both of AdamW's moments in fp32: 18 bytes per parameter (16 where "
    "bf16 weights are cast anew from the master weights for each pass, as FSDP's mixed precision does)",
    "fp8": "weights in FP8 with one fp32 scale per 128 x 128 block, but embedding, head, router and vectors in bf16; "
    "master weights and gradients in fp32; both of AdamW's moments in bf16",
}


def _assumptions(account: ModelAccount, context_tokens: int, precision: str, num_ranks: int) -> Iterator[str]:
    """What the figures stand on, in sentences."""
    yield "active parameters: all that one token passes through, output head included, input embedding left out"
    latent = account.attention.is_latent
    same_size = (
        "a key of qk_nope_head_dim and a value of v_head_dim per head and layer"
        if latent
        else "a key and a value per head"
    )
    yield f"cache: {8 * CACHE_BYTES} bits per value; multi-head attention of the same size keeps {same_size}"
    if saved := _against_predecessor(account):
        yield (
            "cache against DeepSeek 67B (95 layers, 8 key-value heads of 128, 16 bits): "
            f"{saved['kv_cache_saving_against_deepseek_67b']:.1%} less at 16 bits, and "
            f"{saved['kv_cache_saving_against_deepseek_67b_at_6_bits']:.1%} less at the 6 bits per value that V2 was "
            "deployed with (for V2, the published 93.3 %)"
        )
    yield (
        f"FLOPs: 2 per active weight of a matrix, and attention over a causal context of {context_tokens} tokens "
        "(half of it on average); training is 3 times the forward pass, 4 times with every layer computed again"
    )
    yield f"decoding: one token that sees {context_tokens} cached ones" + (
        ", multiplied with their latents as they are" if latent else ""
    )
    if account.mtp_layers:
        yield "multi-token prediction: counted apart, in the training memory included; embedding and head are shared"
    yield f"training memory, AdamW: {_KEPT[precision]}"
    if num_ranks > 1:
        yield (
            "sharding: everything cut into equal parts over all ranks (FSDP), routed experts first over the "
            "expert-parallel ranks; gathered is the largest block while its weights and fresh gradients are whole, "
            "and prefetching would hold another"
        )
    kept = CACHE_BYTES * account.hidden_size * (len(account.layers) + len(account.mtp_layers))
    yield (
        f"not in the memory: activations ({kept:,} bytes per token in bf16 if only each layer's input is kept), "
        "logits, a reference policy, the sampling engine"
    )


def print_description(description: Mapping[str, Any]) -> None:
    """Print the figures, section by section, then what they stand on."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(description["source"], "bold"), f"({description['model_type']})", highlight=False)
    for heading, lines in groupby(_lines(description), key=lambda line: line[0]):
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(min_width=24)
        table.add_column(min_width=12, justify="right", no_wrap=True)
        table.add_column()
        for _, label, value, remark in lines:
            table.add_row(f"  {label}", value, remark)
        console.print(f"\n[bold]{heading}[/]", highlight=False)
        console.print(table)
    console.print("\n[bold]what this stands on[/]")
    for sentence in description["assumptions"]:
        console.print(Padding(sentence, (0, 0, 0, 2)), highlight=False)


def _lines(d: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Section, label, value and remark of each line."""
    total, context = d["total_params"], f"{d['context_tokens']:,} tokens"
    yield "parameters", "total", _count(total), f"{total:,}"
    yield "parameters", "active per token", _count(d["active_params"]), f"{d['active_params']:,}"
    for role, count in d["params_by_role"].items():
        yield "parameters", role.replace("_", " "), _count(count), f"{count / total:.1%}"
    if d["mtp_params"]:
        active = _count(d["mtp_active_params"])
        yield "parameters", "multi-token prediction", _count(d["mtp_params"]), f"counted apart; {active} active"
    values, saving = d["kv_cache_values_per_token"], d["kv_cache_saving"]
    size = d["kv_cache_bytes_per_token"]
    yield "decoding cache", "per token", _bytes(size), f"{size:,} bytes, {values:,} values"
    remark = f"{1 / (1 - saving):.1f} times as much" if saving else "the same"
    yield "decoding cache", "multi-head attention", _bytes(d["mha_kv_cache_bytes_per_token"]), remark
    if "deepseek_67b_kv_cache_bytes_per_token" in d:
        remark = (
            f"{d['kv_cache_saving_against_deepseek_67b']:.1%} less than this; "
            f"{d['kv_cache_saving_against_deepseek_67b_at_6_bits']:.1%} at 6 bits per value"
        )
        yield "decoding cache", "DeepSeek 67B (dense)", _bytes(d["deepseek_67b_kv_cache_bytes_per_token"]), remark
    yield "decoding cache", "per sequence", _bytes(d["kv_cache_bytes_per_sequence"]), context
    attention = f"{d['attention_flops_per_token'] / d['flops_per_token']:.1%} in attention over {context}"
    yield "FLOPs per token", "forward", _flops(d["flops_per_token"]), attention
    yield "FLOPs per token", "training", _flops(d["training_flops_per_token"]), "forward and backward"
    yield "FLOPs per token", "decoding", _flops(d["decoding_flops_per_token"]), f"one token that sees {context}"
    memory = d["training_memory"]
    split = f", experts over {memory['expert_parallel']}" if memory["expert_parallel"] > 1 else ""
    ranks = "1 rank" if memory["num_ranks"] == 1 else f"each of {memory['num_ranks']:,} ranks{split}"
    heading = f"memory to train, {memory['precision']}, {ranks}"
    for name in ("weights", "master_weights", "gradients", "optimizer_states", "gathered"):
        if size := memory[f"{name}_bytes"]:
            yield heading, name.replace("_", " "), _bytes(size), ""
    yield heading, "together", _bytes(memory["total_bytes_per_rank"]), "without activations"


def _count(number: int) -> str:
    return _scaled(number, 1000, ("", "k", "M", "B", "T"))


def _flops(number: int) -> str:
    return _scaled(number, 1000, ("", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs"))


def _bytes(number: int) -> str:
    return _scaled(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def _scaled(number: float, base: int, units: tuple[str, ...]) -> str:
    """Three or four figures and a unit: 671.0 B, 2.45 B."""
    power = 0
    while number >= base and power < len(units) - 1:
        number, power = number / base, power + 1
    digits = 0 if power == 0 else 2 if number < 10 else 1
    return f"{number:,.{digits}f} {units[power]}".rstrip()
