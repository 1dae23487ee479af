"""Forward and backward of the policy against transformers' implementation: same weights, same packed batch, one run.

    python -m scripts.bench_policy                        # the quickstart's policy and a 100M one, on the CPU
    python -m scripts.bench_policy --device cuda --dtype bfloat16 --shapes v2_lite_slice

Every measurement is a process of its own, so that its peak memory is its own; each contender runs `--rounds` times, in
turns, and counts with its best. transformers runs with each of its experts implementations, on the batch packed into one
row (its mask keeps the documents apart) and padded to a rectangle; the fastest of them is the baseline.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policy.checkpoint import load_policy, save_policy
from policy.config import PolicyConfig, YarnScaling
from policy.deepseek import DeepseekPolicy
from policy.logprobs import token_logprobs
from policy.packing import layout

ROOT = Path(__file__).resolve().parent.parent
SHAPES: dict[str, dict[str, Any]] = {
    "quickstart": {"vocab_size": 512, **tomllib.loads((ROOT / "configs/quickstart_base.toml").read_text())["model"]},
    "100m": {
        "vocab_size": 16384,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "moe_intermediate_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "q_lora_rank": 256,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "max_position_embeddings": 1024,
    },
    # Four layers of DeepSeek-V2-Lite's shape with V3's router, which transformers has the faster code for.
    "v2_lite_slice": {
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "max_position_embeddings": 163840,
        "rope_scaling": YarnScaling(
            factor=40, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707
        ),
    },
}
LENGTHS = {  # (shortest, longest, sequences)
    "quickstart": (40, 90, 128),
    "100m": (128, 640, 8),
    "v2_lite_slice": (512, 4096, 12),
}


@dataclass(frozen=True)
class Measured:
    """One contender on one shape: seconds per forward and backward, peak bytes beyond the loaded weights, and the loss."""

    seconds: float
    peak_bytes: int
    loss: float


def batch(shape: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """The packed batch of a shape: input_ids [T], position_ids [T], cu_seqlens [B + 1]."""
    generator = torch.Generator().manual_seed(0)
    shortest, longest, count = LENGTHS[shape]
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    _, position_ids, cu_seqlens = layout(lengths)
    ids = torch.randint(SHAPES[shape]["vocab_size"], (int(lengths.sum()),), generator=generator)
    return ids.to(device), position_ids.to(device), cu_seqlens.to(device)


def ours(folder: Path, packed: tuple[Tensor, ...], device: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The mean negative log-likelihood by the policy, ready to be called."""
    model = load_policy(folder, dtype)
    assert isinstance(model, DeepseekPolicy)
    model.to(device).train()
    input_ids, position_ids, cu_seqlens = packed
    num_targets = len(input_ids) - len(cu_seqlens) + 1

    def loss() -> Tensor:
        model.zero_grad(set_to_none=True)
        return -token_logprobs(model, input_ids, position_ids, cu_seqlens).logprobs.sum() / num_targets

    return loss


def theirs(
    folder: Path, packed: tuple[Tensor, ...], device: str, dtype: torch.dtype, experts: str, padded: bool
) -> Callable[[], Tensor]:
    """The same by transformers, with its own loss from labels."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation=experts)
    model.to(device).train()
    input_ids, position_ids, cu_seqlens = packed
    first = position_ids == 0
    labels = input_ids.masked_fill(first, -100)
    inputs: dict[str, Tensor]
    if padded:
        lengths = cu_seqlens.diff().tolist()
        pad = torch.nn.utils.rnn.pad_sequence
        inputs = {
            "input_ids": pad(list(input_ids.split(lengths)), batch_first=True),
            "labels": pad(list(labels.split(lengths)), batch_first=True, padding_value=-100),
            "attention_mask": pad([torch.ones(n, dtype=torch.long, device=device) for n in lengths], batch_first=True),
        }
    else:
        inputs = {"input_ids": input_ids[None], "labels": labels[None], "position_ids": position_ids[None]}

    def loss() -> Tensor:
        model.zero_grad(set_to_none=True)
        return model(**inputs, use_cache=False).loss

    return loss


def worker(arguments: argparse.Namespace) -> None:
    """Measure one contender in this process and print it as JSON."""
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    packed = batch(arguments.shape, arguments.device)
    kind, *options = arguments.worker.split("/")
    make = ours if kind == "groupzero" else theirs
    extra = {} if kind == "groupzero" else {"experts": options[0], "padded": options[1] == "padded"}
    loss = make(Path(arguments.folder), packed, arguments.device, dtype, **extra)
    on_gpu = arguments.device.startswith("cuda")
    before = _memory(on_gpu)
    seconds, values = [], []
    started = time.perf_counter()
    while len(seconds) < 4 or (time.perf_counter() - started < arguments.seconds and len(seconds) < 200):
        start = time.perf_counter()
        value = loss()
        value.backward()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        values.append(float(value.detach()))
    peak = _memory(on_gpu) - before
    print(json.dumps({"seconds": statistics.median(seconds[2:]), "peak_bytes": peak, "loss": values[0]}))


def _memory(on_gpu: bool) -> int:
    """Peak bytes of this process so far: of its GPU tensors, or of its resident set."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin at what the starting process once held
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def contenders() -> list[str]:
    """Ours, and every way of transformers to run experts on either layout."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    torch_only = [name for name in ALL_EXPERTS_FUNCTIONS.valid_keys() if name in ("batched_mm", "grouped_mm")]
    ways = [f"transformers/{e}/{form}" for e in ["eager", *torch_only] for form in ("packed", "padded")]
    return ["groupzero", *ways]


def measure(name: str, shape: str, folder: Path, arguments: argparse.Namespace) -> Measured | str:
    """Run one contender in a process of its own; its last line of error if it fails."""
    command = [
        sys.executable,
        "-m",
        "scripts.bench_policy",
        "--worker",
        name,
        "--shape",
        shape,
        "--folder",
        str(folder),
    ]
    command += ["--device", arguments.device, "--dtype", arguments.dtype]
    command += ["--threads", str(arguments.threads), "--seconds", str(arguments.seconds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return f"no four steps within {arguments.timeout} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))


def compare(shape: str, arguments: argparse.Namespace) -> dict[str, Measured | str]:
    """Every contender's best round on one shape."""
    config = PolicyConfig(**SHAPES[shape], initializer_range=0.05)
    model = DeepseekPolicy(config)
    model.reset_parameters(0)
    best: dict[str, Measured | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_policy(model, Path(folder))
        del model
        for _ in range(arguments.rounds):
            for name in arguments.contenders or contenders():
                result = measure(name, shape, Path(folder), arguments)
                known = best.get(name)
                if not isinstance(known, Measured) or (isinstance(result, Measured) and result.seconds < known.seconds):
                    best[name] = result
    return best


def report(shape: str, results: dict[str, Measured | str], arguments: argparse.Namespace) -> None:
    """Print a table in Markdown: speed as a ratio to the fastest of transformers' ways."""
    num_tokens = len(batch(shape, "cpu")[0])
    measured = {name: value for name, value in results.items() if isinstance(value, Measured)}
    others = {name: value for name, value in measured.items() if name != "groupzero"}
    print(f"\n{shape}: {num_tokens} tokens in {LENGTHS[shape][2]} sequences, {arguments.dtype}, {arguments.device}\n")
    print("| contender | tokens/s | speed against the baseline | peak memory beyond weights, MiB | loss |")
    print("|---|---|---|---|---|")
    if not others:
        print("| no baseline: every way of transformers failed | | | | |")
    base = min(others.values(), key=lambda value: value.seconds) if others else measured["groupzero"]
    for name, value in results.items():
        if isinstance(value, str):
            print(f"| {name} | failed: {value[:100]} | | | |")
            continue
        mark = " (baseline)" if value is base else ""
        ratio, mib = base.seconds / value.seconds, value.peak_bytes / 2**20
        print(f"| {name}{mark} | {num_tokens / value.seconds:,.0f} | {ratio:.2f} | {mib:,.0f} | {value.loss:.5f} |")


def versions(device: str) -> str:
    """The machine and what ran on it."""
    import transformers

    chip = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return (
        f"{chip}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def main() -> None:
    """Compare all shapes, or be one worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["quickstart", "100m"])
    parser.add_argument("--contenders", nargs="+", choices=contenders(), help="only these [all]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each contender, in turns")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of one measurement")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a contender has failed")
    for hidden in ("--worker", "--shape", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    print(versions(arguments.device))
    for shape in arguments.shapes:
        report(shape, compare(shape, arguments), arguments)


if __name__ == "__main__":
    main()
