"""The commands that train, measure and sample: load the config, open what it names, call the room that does it."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil
from rich.console import Console
from rich.table import Table

from distill.sft import SftConfig, train_sft
from grpo.config import TrainConfig
from grpo.inputs import open_inputs, score_pool
from grpo.report import write_report
from grpo.train import train
from rollout.checkpoints import latest_checkpoint
from rollout.cluster import running_engines
from rollout.engine import SamplingParams
from rollout.errors import UserError
from rollout.evaluation import evaluate
from rollout.interrupt import RunInterrupted
from rollout.records import Task
from rollout.run import Observer, RunRecord, program
from rollout.sampling import Prompter, sample_groups
from rollout.tokenizer import load_tokenizer, stop_ids
from rollout.toml_config import load_config, to_toml
from rollout.torch_engine import TorchEngine
from rollout.trackers import check_trackers
from scripts.display import Display

INTERRUPTED = 130


def run_train(config_path: Path, overrides: Sequence[str], *, resume: bool) -> None:
    """`groupzero train`: make the base if the config asks for one, run GRPO, print before and after.

    A run of this config that was stopped or killed goes on; of one that is finished, the result is printed.
    """
    began = time.monotonic() - (time.time() - psutil.Process().create_time())
    config = load_config(TrainConfig, config_path, overrides)
    if (summary := _finished(config)) is not None:
        if not (config.run_path / "report.html").exists():
            write_report(config.run_path)
        _print_summary(summary, config.run_path)
        return
    base = _base_config(config)
    if config.policy.path is not None:
        _check_checkpoint(config.policy.path)
    check_trackers(config.tracking.trackers)
    inputs = open_inputs(config)
    record = RunRecord.open(config.run_path, config.model_dump(mode="json"), to_toml(config), resume=resume)
    with record, Display() as display:
        try:
            base_dir, base_s = _base(config, base, record, display)
            summary = train(config, base_dir, inputs, record, display, base_s=base_s, began=began)
        except RunInterrupted as interrupt:
            display.close()
            _stopped(str(interrupt), record.command_to_resume)
        except KeyboardInterrupt:
            display.close()
            _stopped("stopped at once, without saving this step", record.command_to_resume)
    _print_summary(summary, record.run_dir)


def run_sft(config_path: Path, overrides: Sequence[str]) -> None:
    """`groupzero sft`: train on documents until the measured quality, or find the result that is there."""
    config = load_config(SftConfig, config_path, overrides)
    with Display() as display:
        try:
            result = train_sft(config, display)
        except RunInterrupted as interrupt:
            display.close()
            _stopped(str(interrupt), shlex.join([program(), "sft", str(config_path), *overrides]))
    _console().print(f"pass@1 {result.pass_at_1:.3f}  {result.folder}", soft_wrap=True)


def run_eval(target: str, overrides: Sequence[str]) -> None:
    """`groupzero eval`: measure a run's newest checkpoint by its own config, or a checkpoint by that of the run it lies in."""
    path = Path(target)
    config_path, checkpoint = _what_to_measure(path)
    config = load_config(TrainConfig, config_path, overrides)
    if any(override.startswith("policy.path=") for override in overrides):
        checkpoint = config.policy.path
    if checkpoint is None:
        checkpoint = latest_checkpoint(config.run_path / "checkpoints") or config.policy.path
    if checkpoint is None:
        raise UserError(f"{config.run_path} has no checkpoint yet: train first, or name a checkpoint folder.")
    _check_checkpoint(checkpoint)
    log_dir = Path(tempfile.mkdtemp(prefix="groupzero-eval-"))
    inputs = open_inputs(config)
    with score_pool(config, None) as pool, Display() as display:
        display.stage("start", f"{config.engine.kind} engine on {checkpoint}")
        with running_engines(config.engine, checkpoint, log_dir, seed=config.seed) as engine:
            tokenizer = load_tokenizer(checkpoint)
            prompter = Prompter(
                tokenizer, config.template, config.engine.max_model_len, config.sampling.max_completion_tokens
            )
            params = SamplingParams(
                temperature=config.eval.temperature,
                top_p=config.eval.top_p,
                max_completion_tokens=config.sampling.max_completion_tokens,
                stop_token_ids=stop_ids(tokenizer),
            )
            display.stage("evaluate", f"{config.eval.num_problems} problems x {config.eval.num_samples} samples")
            result, _ = evaluate(
                engine,
                prompter,
                pool,
                inputs.eval_tasks,
                params,
                num_samples=config.eval.num_samples,
                k=config.eval.k,
                seed=config.seed,
            )
    table = Table("measure", "value", title=str(checkpoint))
    table.add_row("pass@1", f"{result.pass_at_1:.3f}")
    table.add_row(f"pass@{result.k}", f"{result.pass_at_k:.3f}")
    table.add_row(f"majority@{result.k}", f"{result.majority_at_k:.3f}")
    table.add_row("greedy", f"{result.greedy:.3f}")
    table.add_row("completion tokens", f"{result.completion_tokens_mean:.1f}")
    _console().print(table)


def run_sample(
    checkpoint: Path, question: str, *, temperature: float, num_samples: int, template: str, max_completion_tokens: int
) -> None:
    """`groupzero sample`: answers to one question, from the torch engine."""
    _check_checkpoint(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    engine = TorchEngine(checkpoint)
    prompter = Prompter(tokenizer, template, engine.max_model_len, max_completion_tokens)
    params = SamplingParams(
        temperature=temperature,
        max_completion_tokens=max_completion_tokens,
        stop_token_ids=stop_ids(tokenizer),
    )
    task = Task(task_id="question/0", prompt=question, answer=None)
    (group,) = sample_groups(engine, prompter, [task], params, num_samples, lambda _, index: index)
    console = _console()
    for sample in group.samples:
        console.print(sample.completion_text, markup=False, soft_wrap=True)
        if sample.finish_reason == "length":
            console.print(f"[stopped after {max_completion_tokens} tokens]", markup=False, style="dim")


def _what_to_measure(path: Path) -> tuple[Path, Path | None]:
    """(config, checkpoint or None for the newest) of a TOML file, a run folder, or a checkpoint inside a run."""
    if path.suffix == ".toml":
        return path, None
    for parent in (path, *path.parents):
        if (parent / "config.toml").is_file():
            return parent / "config.toml", None if parent == path else path
    if path.is_dir():
        raise UserError(
            f"{path} does not lie in a run folder, so nothing says what to measure it on. Name a config and set its "
            f"policy: groupzero eval configs/quickstart.toml policy.path={path} policy.sft_config=null run_dir=..."
        )
    raise UserError(f"{path} is neither a config nor a checkpoint folder.")


def _base_config(config: TrainConfig) -> SftConfig | None:
    """The config of the base to make, with this run's seed; None where the policy is a checkpoint."""
    if config.policy.sft_config is None:
        return None
    base = load_config(SftConfig, config.policy.sft_config, [f"seed={config.seed}"])
    if base.template != config.template:
        raise UserError(
            f"template={config.template!r}, but {config.policy.sft_config} trains the base on {base.template!r}."
        )
    context = (base.model or {}).get("max_position_embeddings")
    if context is not None and config.engine.max_model_len > context:
        raise UserError(
            f"engine.max_model_len={config.engine.max_model_len} exceeds the base's context of {context} tokens."
        )
    return base


def _finished(config: TrainConfig) -> dict[str, Any] | None:
    """The summary of a run that was done before with just this config; None otherwise."""
    path = config.run_path / "summary.json"
    if not path.exists() or (config.run_path / "config.toml").read_text() != to_toml(config):
        return None
    return json.loads(path.read_text())


def _base(config: TrainConfig, base: SftConfig | None, record: RunRecord, observer: Observer) -> tuple[Path, float]:
    """The first weights' folder and the seconds spent on it; a run that has a checkpoint needs none."""
    if (checkpoint := latest_checkpoint(record.run_dir / "checkpoints")) is not None:
        return checkpoint, 0.0
    if base is None:
        assert config.policy.path is not None  # the config's own check
        return config.policy.path, 0.0
    result = train_sft(base, observer)
    base_of_run = {"folder": str(result.folder), "pass_at_1": result.pass_at_1, "config": base.model_dump(mode="json")}
    recorded = record.run_dir / "base.json"
    if recorded.exists() and json.loads(recorded.read_text())["folder"] != base_of_run["folder"]:
        raise UserError(
            f"{recorded} names another base than {config.policy.sft_config} makes now ({result.folder}): the config or the "
            f"code has changed since this run began, and it has no checkpoint yet. Remove {record.run_dir} to begin anew."
        )
    record.write_json("base", base_of_run)
    observer.message(f"base model: pass@1 {result.pass_at_1:.3f}, {result.folder}")
    return result.folder, result.seconds


def _check_checkpoint(folder: Path) -> None:
    """Whether the policy and its tokenizer can be loaded from `folder`, from the small files alone."""
    from policy.checkpoint import read_config

    read_config(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} has no tokenizer.json: save the tokenizer beside the weights (tokenizer.save_pretrained)."
        )


def _stopped(text: str, command: str) -> NoReturn:
    _console().print(text, markup=False, soft_wrap=True)
    if command not in text:
        _console().print(f"go on with\n  {command}", markup=False, soft_wrap=True)
    sys.exit(INTERRUPTED)


def _print_summary(summary: dict[str, Any], run_dir: Path) -> None:
    seconds = {stage: value for stage, value in summary["seconds_by_stage"].items() if value >= 0.05}
    table = Table("held-out accuracy", "before", "after")
    k = summary["k"]
    for name, key in (
        ("pass@1", "pass_at_1"),
        (f"pass@{k}", "pass_at_k"),
        (f"majority@{k}", "majority_at_k"),
        ("greedy", "greedy"),
    ):
        table.add_row(name, f"{summary[f'{key}_before']:.3f}", f"{summary[f'{key}_after']:.3f}")
    console = _console()
    console.print(table)
    console.print(summary["learning_or_sharpening"], markup=False)
    spent = ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items())
    console.print(f"{summary['wall_s']:.0f} s in all: {spent}", markup=False)
    console.print(
        f"accuracy {summary['pass_at_1_before']:.3f} -> {summary['pass_at_1_after']:.3f}", markup=False, style="bold"
    )
    console.print(f"report   {run_dir / 'report.html'}", markup=False, soft_wrap=True)


def _console() -> Console:
    return Console(highlight=False)
