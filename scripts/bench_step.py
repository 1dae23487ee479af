"""Time per step against TRL's GRPOTrainer: the same policy, prompts, reward and loss, one process after the other.

    python -m scripts.bench_step                     # both, with torch and vLLM engines: some five minutes on two cores
    python -m scripts.bench_step --skip-trl          # without TRL, which requirements/bench.txt installs
    python -m scripts.bench_step --steps 30 --seeds 0 1 2        # longer reward curves
    python -m scripts.bench_step --sweep --skip-trl  # how our step grows with group size, length and number of engines

Ours is `groupzero train` on a config of the job, read from its metrics.jsonl. Times are medians over the steps after the
warm-up, of all seeds. Memory is that of the process and all its children (engines, verifiers) together. A little over 400
lines, so that the job, how it is measured and what is said of it are read in one place.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("sampling", "scoring", "learning", "sync", "other")
POLICY: dict[str, Any] = {  # 1.96M parameters; kv_lora_rank and qk_rope_head_dim are what vLLM's CPU kernel takes
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "max_position_embeddings": 1024,
}
MAX_PROMPT_TOKENS = 32
POLL_S = 0.25


class BenchError(RuntimeError):
    """A contender could not run."""


@dataclass(frozen=True)
class Job:
    """What is measured; `engine` is an engine kind, or "trl"."""

    engine: str
    num_engines: int = 1
    num_steps: int = 16
    num_prompts: int = 16
    group_size: int = 8
    max_completion_tokens: int = 64
    lr: float = 2e-3
    num_threads: int = os.cpu_count() or 1
    seed: int = 0
    kl_coef: float = 0.001
    max_tokens_per_microbatch: int = 2048
    trl_experts: str = "grouped_mm"
    trl_microbatches: int = 1

    @property
    def name(self) -> str:
        """The contender's name in the tables."""
        if self.engine == "trl":
            return "TRL"
        where = "in process" if self.engine == "torch" and self.num_engines == 1 else f"Ray x{self.num_engines}"
        return f"groupzero, {self.engine} ({where})"


@dataclass(frozen=True)
class Result:
    """One process: a row per step (seconds by stage and `total`, reward, ...), peak bytes, and seconds in all."""

    steps: list[dict[str, float]]
    peak_bytes: int
    main_peak_bytes: int
    wall_s: float


def digit_share(completion: str, task: Any) -> float:
    """The reward: the share of the completion's characters that are digits."""
    return sum(map(str.isdigit, completion)) / max(len(completion), 1)


def make_checkpoint(folder: Path) -> None:
    """A policy of random weights and a tokenizer for its prompts, which both sides load."""
    from policy.checkpoint import save_policy
    from policy.config import PolicyConfig
    from policy.deepseek import DeepseekPolicy
    from rollout.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(prompts(0, 100, 16), POLICY["vocab_size"], "{{ messages[0]['content'] }}")
    ends: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = DeepseekPolicy(PolicyConfig(**POLICY, **ends))
    model.reset_parameters(0)
    folder.mkdir()
    save_policy(model, folder)
    tokenizer.save_pretrained(folder)


def prompts(seed: int, num_steps: int, num_prompts: int) -> list[str]:
    """The texts of all steps' prompts, in order, as `groupzero train` makes them of `train_config`."""
    from rollout.tasks import DataConfig, load_tasks
    from rollout.templates import render

    source = load_tasks(DataConfig(source="generator", generator="arithmetic"))
    return [render("r1_zero", task) for step in range(num_steps) for task in source.for_step(seed, step, num_prompts)]


LOSS = {"clip_low": 0.2, "clip_high": 0.28}
OPTIMIZER = {"betas": (0.9, 0.95), "max_grad_norm": 1.0}


def train_config(job: Job, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """The job as a config of `groupzero train`; the loss is TRL's `dapo` with its defaults."""
    data = {"source": "generator", "generator": "arithmetic"}
    context = MAX_PROMPT_TOKENS + job.max_completion_tokens
    in_process = job.engine == "torch" and job.num_engines == 1
    return {
        "name": "bench",
        "seed": job.seed,
        "run_dir": str(folder / "run"),
        "num_steps": job.num_steps,
        "num_prompts": job.num_prompts,
        "group_size": job.group_size,
        "policy": {"path": str(checkpoint)},
        "data": data,
        "rewards": [{"name": "digits", "verifier": "scripts.bench_step:digit_share"}],
        "scoring": {"num_workers": 1},
        "sampling": {"temperature": 1.0, "max_completion_tokens": job.max_completion_tokens},
        "engine": {
            "kind": job.engine,
            "placement": "in_process" if in_process else "ray",
            "num_engines": job.num_engines,
            "max_model_len": context,
            "num_threads": max(1, job.num_threads // job.num_engines),
            "max_num_seqs": job.num_prompts * job.group_size,
            "kv_cache_gib": 0.5,
        },
        "algorithm": {
            "advantage_std": "group",
            "advantage_ddof": 1,
            "advantage_eps": 1e-4,
            "aggregation": "token_mean",
            "kl_estimator": "k3",
            "kl_importance_weighted": True,
            "kl_coef": job.kl_coef,
            **LOSS,
        },
        "learner": {
            "lr": job.lr,
            "num_threads": job.num_threads,
            "max_tokens_per_microbatch": max(job.max_tokens_per_microbatch, context),
            **OPTIMIZER,
        },
        "eval": {"data": {**data, "split": "heldout"}, "num_problems": 1, "num_samples": 1, "k": 1},
        "checkpoint": {"every_steps": job.num_steps},
    }


def run_groupzero(job: Job, checkpoint: Path, folder: Path) -> Result:
    """`groupzero train` on the job."""
    import tomli_w

    config = folder / "config.toml"
    config.write_text(tomli_w.dumps(train_config(job, checkpoint, folder)))
    command = [sys.executable, "-m", "scripts.cli", "train", str(config)]
    peak, main_peak, wall_s = watched(command, folder / "log", job.name)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return Result([step_row(json.loads(line)) for line in lines], peak, main_peak, wall_s)


def step_row(metrics: dict[str, Any]) -> dict[str, float]:
    """One step of ours in the names that both sides share."""
    return {
        **{stage: metrics[f"seconds_{stage}"] for stage in (*STAGES, "total")},
        "reward": metrics["reward_mean"],
        "completion_tokens": metrics["completion_tokens_mean"],
        **{name: metrics[name] for name in ("loss", "entropy", "grad_norm")},
    }


def run_trl(job: Job, checkpoint: Path, folder: Path, python: str) -> Result:
    """The job in TRL's GRPOTrainer, by `scripts.bench_step_trl`."""
    given = {
        **dataclasses.asdict(job),
        **LOSS,
        **OPTIMIZER,
        "checkpoint": str(checkpoint),
        "folder": str(folder),
        "prompts": prompts(job.seed, job.num_steps, job.num_prompts),
    }
    (folder / "job.json").write_text(json.dumps(given))
    result = folder / "result.json"
    command = [python, "-m", "scripts.bench_step_trl", str(folder / "job.json"), str(result)]
    peak, main_peak, wall_s = watched(command, folder / "log", job.name)
    return Result(json.loads(result.read_text()), peak, main_peak, wall_s)


def watched(command: Sequence[str], log: Path, name: str) -> tuple[int, int, float]:
    """Run a command to its end; (peak bytes with its children, peak bytes of itself, seconds). BenchError if it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("OMP_NUM_THREADS", None)  # both sides set their threads themselves
    started = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
        watch = MemoryWatch(process.pid)
        try:
            status = process.wait()
        finally:
            process.kill()
            watch.close()
    if status:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise BenchError(f"{name} ended with status {status}:\n{end}")
    return watch.peak_bytes, watch.main_peak_bytes, time.perf_counter() - started


class MemoryWatch:
    """Peak memory of a process and its descendants, looked at every POLL_S seconds.

    `peak_bytes` is the largest sum of their proportional set sizes (PSS: shared pages count once), `main_peak_bytes` the
    process's own high-water mark (VmHWM).
    """

    def __init__(self, pid: int) -> None:
        self.peak_bytes = self.main_peak_bytes = 0
        self._pid, self._ended = pid, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        import psutil

        while not self._ended.wait(POLL_S):
            try:
                children = psutil.Process(self._pid).children(recursive=True)
            except psutil.NoSuchProcess:
                return
            pids = [self._pid, *(child.pid for child in children)]
            self.peak_bytes = max(self.peak_bytes, sum(read_kib(pid, "smaps_rollup", "Pss:") for pid in pids) * 1024)
            self.main_peak_bytes = max(self.main_peak_bytes, read_kib(self._pid, "status", "VmHWM:") * 1024)


def read_kib(pid: int, file: str, field: str) -> int:
    """A figure of /proc/PID in KiB; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def run(job: Job, python: str = sys.executable) -> Result:
    """Measure one job in a fresh folder, with the same first weights as every other."""
    with tempfile.TemporaryDirectory(prefix="groupzero-bench-") as name:
        folder = Path(name)
        make_checkpoint(folder / "checkpoint")
        if job.engine == "trl":
            return run_trl(job, folder / "checkpoint", folder, python)
        return run_groupzero(job, folder / "checkpoint", folder)


def medians(results: Sequence[Result], num_warmup: int) -> dict[str, float]:
    """Median of each figure over the steps after the warm-up, of all results."""
    rows = [row for result in results for row in result.steps[num_warmup:]]
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def comparison_table(results: dict[str, list[Result]], num_warmup: int) -> str:
    """Markdown: seconds per step by stage, memory, and the ratio to TRL where it ran."""
    peer = medians(results["TRL"], num_warmup)["total"] if "TRL" in results else None
    lines = [
        "| contender | s/step | "
        + " | ".join(STAGES)
        + " | tokens/completion | all processes, MiB | main process, MiB "
        "| start and end, s | speed, TRL = 1 |",
        "|---" * (len(STAGES) + 7) + "|",
    ]
    for name, runs in results.items():
        middle = medians(runs, num_warmup)
        speed = "" if peer is None else f"{peer / middle['total']:.2f}"
        outside = statistics.median(r.wall_s - sum(row["total"] for row in r.steps) for r in runs)
        lines.append(
            f"| {name} | {middle['total']:.2f} | "
            + " | ".join(f"{middle[stage]:.2f}" for stage in STAGES)
            + f" | {middle['completion_tokens']:.1f} | {max(r.peak_bytes for r in runs) / 2**20:,.0f} "
            f"| {max(r.main_peak_bytes for r in runs) / 2**20:,.0f} | {outside:.0f} | {speed} |"
        )
    return "\n".join(lines)


def curves_table(results: dict[str, list[Result]], num_points: int = 8) -> str:
    """Markdown: the mean reward over the seeds at some steps, and at the end with its spread over the seeds."""
    num_steps = min(len(result.steps) for runs in results.values() for result in runs)
    last = max(1, num_steps // 4)
    points = sorted({round(i * (num_steps - 1) / (num_points - 1)) for i in range(num_points)})
    lines = [
        "| mean reward at step | " + " | ".join(map(str, points)) + f" | last {last} | standard error |",
        "|---" * (len(points) + 3) + "|",
    ]
    for name, runs in results.items():
        means = [statistics.fmean(result.steps[point]["reward"] for result in runs) for point in points]
        end, error = end_reward(runs, last)
        lines.append(f"| {name} | " + " | ".join(f"{mean:.3f}" for mean in means) + f" | {end:.3f} | {error:.3f} |")
    return "\n".join(lines)


def end_reward(runs: Sequence[Result], last: int) -> tuple[float, float]:
    """Mean reward of the last steps and its standard error over the seeds (0 for one seed: unknown)."""
    ends = [statistics.fmean(row["reward"] for row in result.steps[-last:]) for result in runs]
    error = statistics.stdev(ends) / len(ends) ** 0.5 if len(ends) > 1 else 0.0
    return statistics.fmean(ends), error


def verdict(results: dict[str, list[Result]]) -> str:
    """Whether each of our curves ends where TRL's does, in standard errors of the difference."""
    if "TRL" not in results:
        return "TRL was left out: no curve to compare with."
    last = max(1, min(len(result.steps) for runs in results.values() for result in runs) // 4)
    theirs, their_error = end_reward(results["TRL"], last)
    lines = []
    for name, runs in results.items():
        if name == "TRL":
            continue
        ours, our_error = end_reward(runs, last)
        noise = (our_error**2 + their_error**2) ** 0.5
        apart = (
            f"{abs(ours - theirs) / noise:.1f} standard errors of it" if noise else "of unknown noise, one seed only"
        )
        lines.append(f"{name}: reward at the end {ours - theirs:+.3f} against TRL, {apart}")
    return "\n".join(lines)


def sweep_jobs(base: Job, engines: Sequence[str]) -> list[Job]:
    """The base job on each engine, then one thing changed at a time."""
    jobs = []
    for engine in engines:
        start = dataclasses.replace(base, engine=engine)
        sizes, lengths = ((4, 16, 32), (32, 128, 256)) if engine == "torch" else ((32,), (256,))
        jobs.append(start)
        jobs += [dataclasses.replace(start, group_size=size) for size in sizes]
        jobs += [dataclasses.replace(start, max_completion_tokens=length) for length in lengths]
        jobs.append(dataclasses.replace(start, num_engines=2))
    return jobs


def sweep_table(jobs: Sequence[Job], measure: Callable[[Job], Result], num_warmup: int) -> str:
    """Markdown: one row per job, with seconds per step by stage and microseconds per completion token."""
    lines = [
        "| contender | group size | longest completion | completion tokens/step | s/step | "
        + " | ".join(STAGES)
        + " | µs/token | all processes, MiB |",
        "|---" * (len(STAGES) + 7) + "|",
    ]
    for job in jobs:
        result = measure(job)
        middle = medians([result], num_warmup)
        tokens = middle["completion_tokens"] * job.num_prompts * job.group_size
        lines.append(
            f"| {job.name} | {job.group_size} | {job.max_completion_tokens} | {tokens:,.0f} | {middle['total']:.2f} | "
            + " | ".join(f"{middle[stage]:.2f}" for stage in STAGES)
            + f" | {middle['total'] / tokens * 1e6:.0f} | {result.peak_bytes / 2**20:,.0f} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def check_trl(python: str) -> str:
    """The version of TRL that `python` has; BenchError says how to install it."""
    code = "from importlib.metadata import version; print(version('trl'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise BenchError(
            f"{python} has no TRL. Install it with\n  {python} -m pip install --no-deps -r requirements/bench.txt\n"
            "or name another environment's python by --trl-python, or leave TRL out by --skip-trl."
        )
    return done.stdout.strip()


def machine() -> str:
    """The machine and what runs on it."""
    from importlib.metadata import version

    names = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    load = os.getloadavg()[0]
    return f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} at the start; {names}"


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16, help="steps of each run")
    parser.add_argument("--warmup", type=int, default=4, help="steps left out of the times")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one run of each contender per seed")
    parser.add_argument("--engines", nargs="*", choices=["torch", "vllm"], default=["torch", "vllm"])
    parser.add_argument("--kl-coef", type=float, default=Job.kl_coef, help="0: neither side holds a reference")
    parser.add_argument("--microbatch-tokens", type=int, default=Job.max_tokens_per_microbatch, help="of our learner")
    parser.add_argument("--skip-trl", action="store_true", help="leave TRL out")
    parser.add_argument("--trl-python", default=sys.executable, help="python of the environment that has TRL")
    parser.add_argument("--trl-experts", default=Job.trl_experts, help="transformers' implementation of experts")
    parser.add_argument(
        "--trl-microbatches", type=int, default=1, help="parts of TRL's step: more take less memory and more time"
    )
    parser.add_argument("--sweep", action="store_true", help="also measure how our step grows")
    parser.add_argument("--sweep-steps", type=int, default=5, help="steps of each run of the sweep, one is warm-up")
    return parser.parse_args()


def main() -> None:
    """Run every contender on every seed and print one Markdown page."""
    options = arguments()
    if not 0 <= options.warmup < options.steps:
        sys.exit(f"error: --warmup {options.warmup} must be smaller than --steps {options.steps}")
    try:
        trl = "left out" if options.skip_trl else check_trl(options.trl_python)
        print(f"# Time per step\n\n{machine()}; trl {trl}\n", flush=True)
        compare(options)
        if options.sweep:
            jobs = sweep_jobs(Job("torch", num_steps=options.sweep_steps), options.engines)
            print("\n## Growth of our step\n", flush=True)
            print(sweep_table(jobs, run, 1))
    except BenchError as error:
        sys.exit(f"error: {error}")


def compare(options: argparse.Namespace) -> None:
    """The tables of times and of rewards."""
    engines = [*([] if options.skip_trl else ["trl"]), *options.engines]
    results: dict[str, list[Result]] = {}
    for seed in options.seeds:  # the contenders in turns, so that a busy hour hits them alike
        for engine in engines:
            job = Job(
                engine,
                num_steps=options.steps,
                seed=seed,
                kl_coef=options.kl_coef,
                max_tokens_per_microbatch=options.microbatch_tokens,
                trl_experts=options.trl_experts,
                trl_microbatches=options.trl_microbatches,
            )
            print(f"{job.name}, seed {seed} ...", file=sys.stderr, flush=True)
            results.setdefault(job.name, []).append(run(job, options.trl_python))
    if results:
        print(comparison_table(results, options.warmup))
        print(f"\n{curves_table(results)}\n\n{verdict(results)}")


if __name__ == "__main__":
    main()
