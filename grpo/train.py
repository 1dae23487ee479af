"""The loop: the only place that knows the order sample, score, advantage, loss, step, sync.

A little over 400 lines, because what a run keeps between steps (checkpoints, times, measurements) is read beside the loop.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo.batch import build_batch
from grpo.config import TrainConfig
from grpo.learner import Learner, NonFiniteLossError
from grpo.measures import learning_or_sharpening, read_eval, sample_metrics, with_advantages
from grpo.report import write_report
from policy.account import account_of
from policy.checkpoint import atomic_folder, load_policy, save_policy
from policy.interface import Policy
from rollout.cluster import running_engines
from rollout.engine import Engine, SamplingParams
from rollout.errors import UserError
from rollout.evaluation import FAILED, EvalResult, evaluate, is_correct, pass_at_k
from rollout.interrupt import RunInterrupted, stop_on_signal
from rollout.records import Group, Task
from rollout.run import Observer, RunRecord, read_metrics
from rollout.sampling import GroupStream, Prompter
from rollout.tasks import TaskSource, load_tasks
from rollout.tokenizer import load_tokenizer, stop_ids
from rollout.weights import WeightSync
from verifiers.pool import ScorePool, VerifierSpec

LEARNER_STATE = "learner.pt"
STAGES = ("base", "start", "eval", "sampling", "scoring", "learning", "sync", "other")


MAX_GOLDS_CHECKED = 2000


class VerifierFailureError(RuntimeError):
    """The verifier failed on more samples of a step than the config allows."""


@dataclass(frozen=True)
class Inputs:
    """The tasks of a run, opened and checked before anything expensive starts."""

    source: TaskSource
    eval_tasks: list[Task]


def open_inputs(config: TrainConfig) -> Inputs:
    """Load both data sets and try the verifiers; UserError or the verifier's own error for bad input."""
    source, held_out = load_tasks(config.data), load_tasks(config.eval.data)
    if len(source) < config.num_prompts:
        raise UserError(f"num_prompts={config.num_prompts} exceeds the {len(source)} rows of the training data.")
    if len(held_out) < config.eval.num_problems:
        raise UserError(f"eval.num_problems={config.eval.num_problems} exceeds the {len(held_out)} held-out rows.")
    eval_tasks = [held_out.task(i) for i in range(config.eval.num_problems)]
    with score_pool(config, None) as pool:
        checked = [source.task(i) for i in range(min(len(source), MAX_GOLDS_CHECKED))]
        _check_golds(pool, [*checked, *eval_tasks], config.scoring.max_error_share)
    return Inputs(source, eval_tasks)


def _check_golds(pool: ScorePool, tasks: Sequence[Task], max_share: float) -> None:
    """UserError if the verifiers can't use more than `max_share` of the gold answers."""
    audits = zip(tasks, pool.prepare(tasks), strict=True)
    bad = [(task, audit) for task, audit in audits if audit is not None and audit.status in ("missing", "unparsable")]
    if len(bad) > max_share * len(tasks):
        task, audit = bad[0]
        raise UserError(
            f"the verifier can't use {len(bad)} of the {len(tasks)} gold answers looked at; the first is that of "
            f"{task.task_id}: {audit.reason}. `groupzero verify-data` lists them."
        )


def score_pool(config: TrainConfig, log_path: Path | None) -> ScorePool:
    """The verifier processes; what plug-ins print goes to `log_path`, or nowhere."""
    specs = [VerifierSpec(r.name, r.verifier, r.weight, r.options, r.timeout_s) for r in config.rewards]
    scoring = config.scoring
    return ScorePool(specs, scoring.num_workers, scoring.timeout_s, scoring.memory_limit_mb, log_path=log_path)


def train(
    config: TrainConfig,
    base_dir: Path,
    inputs: Inputs,
    record: RunRecord,
    observer: Observer,
    *,
    base_s: float = 0.0,
    began: float | None = None,
) -> dict[str, Any]:
    """Run, or resume, GRPO from the checkpoint `base_dir` and return the summary, which is in the run folder too.

    `began` is the `time.monotonic()` from which the run's wall time counts (default: now), `base_s` what of it went into
    making the base.

    On SIGINT or SIGTERM the run finishes its step, saves, and raises RunInterrupted; a second one stops at once.
    """
    torch.set_num_threads(config.learner.num_threads)
    with stop_on_signal() as stop, score_pool(config, record.log_path("verifiers")) as pool:
        started = time.monotonic()
        run = _Run(config, base_dir, inputs, pool, record, observer, began=started - base_s if began is None else began)
        run.seconds["base"] += base_s
        observer.stage(
            "start", f"{config.engine.num_engines} {config.engine.kind} engine(s), {config.engine.placement}"
        )
        with running_engines(config.engine, run.weights_dir, record.run_dir / "logs", seed=config.seed) as engine:
            run.connect(engine)
            run.seconds["start"] += time.monotonic() - run.began - base_s
            before = run.measure("eval_before")
            run.loop(stop)
            if stop.is_set():
                raise RunInterrupted(f"stopped before the last measurement; go on with\n  {record.command_to_resume}")
            after = run.measure("eval_after")
        return run.finish(before, after)


class _Run:
    """The state of one run between its steps."""

    def __init__(
        self,
        config: TrainConfig,
        base_dir: Path,
        inputs: Inputs,
        pool: ScorePool,
        record: RunRecord,
        observer: Observer,
        *,
        began: float,
    ):
        self.config, self.inputs, self.pool, self.record, self.observer = config, inputs, pool, record, observer
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.began = began
        self.earlier_s = 0.0  # wall time of the run before this process took it up
        self.checkpoints = record.run_dir / "checkpoints"
        for leftover in self.checkpoints.glob(".step-*.tmp"):  # of a process that was killed; the folder's lock is ours
            shutil.rmtree(leftover, ignore_errors=True)
        latest = latest_checkpoint(self.checkpoints)
        self.weights_dir = latest or base_dir
        self.model: Policy = load_policy(self.weights_dir)
        self.tokenizer = load_tokenizer(self.weights_dir)
        self.learner = Learner(
            self.model,
            config.learner,
            config.algorithm,
            temperature=config.sampling.temperature,
            seed=config.seed,
            bad_batch_path=record.run_dir / "bad_batch.pt",
        )
        self.first_step = 0
        if latest is not None:
            state = torch.load(latest / LEARNER_STATE, map_location="cpu", weights_only=True)
            self.learner.load_state_dict(state["learner"])
            self.first_step = state["step"]
            self.seconds |= state["seconds"]
            self.earlier_s = sum(self.seconds.values())
            observer.message(f"resuming at step {self.first_step} from {latest}")
        if record.resumed:
            record.truncate(self.first_step)
        self.prompter = self._prompter()
        self.stop_ids = stop_ids(self.tokenizer)

    def _prompter(self) -> Prompter:
        config = self.config
        context = self.model.config.max_position_embeddings
        if config.engine.max_model_len > context:
            raise UserError(
                f"engine.max_model_len={config.engine.max_model_len} exceeds the policy's context of {context} tokens."
            )
        prompter = Prompter(
            self.tokenizer, config.template, config.engine.max_model_len, config.sampling.max_completion_tokens
        )
        # Every prompt of a finite data set is checked now; an endless generator is sampled.
        count = min(len(self.inputs.source), 100_000) if config.data.source != "generator" else 64
        for task in itertools.chain(self.inputs.eval_tasks, map(self.inputs.source.task, range(count))):
            prompter.ids(task)
        return prompter

    def connect(self, engine: Engine) -> None:
        """Take the engine into use and prove that it computes what the learner computes."""
        config = self.config
        self.engine = engine
        self.sync = WeightSync(
            engine,
            vocab_size=self.model.config.vocab_size,
            engine_dtype=config.engine.dtype,
            config=config.sync,
        )
        self.sync.publish(self.model, self.first_step)
        params = SamplingParams(
            temperature=config.sampling.temperature,
            max_completion_tokens=config.sampling.max_completion_tokens,
            stop_token_ids=self.stop_ids,
        )
        self.stream = GroupStream(
            engine, self.inputs.source, self.prompter, self.pool, params, config.group_size, config.seed
        )

    def loop(self, stop: threading.Event) -> None:
        """Every step from where the run stands, with checkpoints; what goes wrong in a step leaves the last one saved."""
        config = self.config
        self.observer.stage("train", f"{config.num_prompts} prompts x {config.group_size} samples")
        for step in range(self.first_step, config.num_steps):
            if stop.is_set():
                self._save(step)
                raise RunInterrupted(f"stopped before step {step}; go on with\n  {self.record.command_to_resume}")
            metrics = self._step(step)
            done = step + 1
            if config.eval.every_steps and done % config.eval.every_steps == 0 and done < config.num_steps:
                metrics["eval_pass_at_1"] = self._quick_eval()
            self.record.record(metrics)
            self.observer.step(done, config.num_steps, metrics)
            if done % config.checkpoint.every_steps == 0 or done == config.num_steps:
                self._save(done)

    def _step(self, step: int) -> dict[str, Any]:
        """Sample, score, learn and sync once."""
        config = self.config
        start = time.monotonic()
        groups = self.stream.next_groups(step, config.num_prompts)
        self._check_verdicts(groups, step)
        groups = with_advantages(groups, config)
        samples = [sample for group in groups for sample in group.samples]
        self.record.write_samples(step, groups, "train", [self.prompter.text(group.task) for group in groups])
        learning = time.monotonic()
        batch = build_batch(samples, [sample.advantage or 0.0 for sample in samples])
        try:
            learned = self.learner.step(batch, step)
        except NonFiniteLossError as error:
            self.record.record({"step": step, "skipped": config.learner.num_minibatches, "stopped": str(error)})
            kept = latest_checkpoint(self.checkpoints)
            raise NonFiniteLossError(
                f"step {step}: {error} The newest checkpoint is {kept or 'not there yet'}. To go on from it, with the same "
                f"samples again:\n  {self.record.command_to_resume}"
            ) from error
        refresh = config.algorithm.reference_refresh_steps
        if refresh and (step + 1) % refresh == 0:
            self.learner.refresh_reference()
        syncing = time.monotonic()
        report = self.sync.publish(self.model, step + 1)
        synced = time.monotonic()
        seconds = {
            "sampling": self.stream.seconds_sampling,
            "scoring": self.stream.seconds_scoring,
            "learning": syncing - learning,
            "sync": synced - syncing,
        }
        total = time.monotonic() - start
        seconds["other"] = total - sum(seconds.values())
        for stage in ("sampling", "scoring", "learning", "sync"):
            self.seconds[stage] += seconds[stage]
        measured = sample_metrics(groups, [reward.name for reward in config.rewards])
        return {
            "step": step,
            "policy_version": step + 1,
            **measured,
            **learned,
            "probe_gap": report.probe_gap,
            "tokens_per_s": measured["completion_tokens_total"] / total,
            "sampling_tokens_per_s": measured["completion_tokens_total"] / max(seconds["sampling"], 1e-9),
            **{f"seconds_{stage}": value for stage, value in seconds.items()},
            "seconds_total": total,
        }

    def _check_verdicts(self, groups: Sequence[Group], step: int) -> None:
        """Report the step's verifier failures; too many stop the run, with everything up to this step saved."""
        try:
            self._report_failures(groups, f"step {step}")
        except VerifierFailureError as error:
            self._save(step)
            self.record.write_samples(step, groups, "train", [self.prompter.text(group.task) for group in groups])
            raise VerifierFailureError(
                f"{error} The state before this step is saved; go on with\n  {self.record.command_to_resume}"
            ) from error

    def _report_failures(self, groups: Sequence[Group], what: str) -> None:
        """Say how many samples the verifier could not judge; VerifierFailureError above max_error_share."""
        failed = [s.verdict for g in groups for s in g.samples if s.verdict and s.verdict.status in FAILED]
        if not failed:
            return
        total = sum(len(group.samples) for group in groups)
        (reason, count), *_ = Counter(verdict.reason for verdict in failed).most_common(1)
        text = f"{what}: the verifier failed on {len(failed)} of {total} samples; most often ({count} times): {reason}."
        share = self.config.scoring.max_error_share
        if len(failed) > share * total:
            raise VerifierFailureError(
                f"{text} That is more than scoring.max_error_share={share:g} allows: mend the verifier."
            )
        self.observer.message(text)

    def measure(self, phase: str) -> tuple[EvalResult, list[float]]:
        """The held-out measurement of a phase with pass@k of each problem; `eval_before` is done once in a run's life."""
        path = self.record.run_dir / f"{phase}.json"
        if phase == "eval_before" and path.exists():
            return read_eval(path)
        with self._timed("eval"):
            config = self.config.eval
            self.observer.stage(
                "evaluate",
                f"{config.num_problems} held-out problems x {config.num_samples} samples, {phase.removeprefix('eval_')}",
            )
            result, groups = evaluate(
                self.engine,
                self.prompter,
                self.pool,
                self.inputs.eval_tasks,
                self._eval_params(),
                num_samples=config.num_samples,
                k=config.k,
                seed=self.config.seed,
            )
            self._report_failures(groups, phase)
            each = [pass_at_k(config.num_samples, sum(map(is_correct, g.samples)), config.k) for g in groups]
            step = 0 if phase == "eval_before" else self.config.num_steps
            texts = [self.prompter.text(group.task) for group in groups]
            self.record.write_samples(step, groups, "eval_before" if phase == "eval_before" else "eval_after", texts)
            self.record.write_json(phase, {**result.to_dict(), "pass_at_k_by_problem": each})
            self.observer.message(
                f"{phase.removeprefix('eval_')} training: pass@1 {result.pass_at_1:.3f}, pass@{config.k} {result.pass_at_k:.3f}, "
                f"majority@{config.k} {result.majority_at_k:.3f}, greedy {result.greedy:.3f}"
            )
        return result, each

    def _quick_eval(self) -> float:
        with self._timed("eval"):
            result, _ = evaluate(
                self.engine,
                self.prompter,
                self.pool,
                self.inputs.eval_tasks,
                self._eval_params(),
                num_samples=1,
                k=1,
                seed=self.config.seed,
                greedy=False,
            )
        return result.pass_at_1

    def _eval_params(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.config.eval.temperature,
            top_p=self.config.eval.top_p,
            max_completion_tokens=self.config.sampling.max_completion_tokens,
            stop_token_ids=self.stop_ids,
        )

    def _save(self, step: int) -> None:
        """A checkpoint of the state before `step`: Hugging Face files and the learner's state, whole or not at all."""
        folder = self.checkpoints / f"step-{step:06d}"
        if (folder / LEARNER_STATE).exists():
            return
        # Weights, two optimizer moments and the reference, with a tenth to spare.
        needed = int(4.4 * sum(p.numel() * p.element_size() for p in self.model.parameters()))
        with atomic_folder(folder, needed) as temporary:
            save_policy(self.model, temporary)
            self.tokenizer.save_pretrained(temporary)
            self._settle()
            state = {"learner": self.learner.state_dict(), "step": step, "seconds": self.seconds}
            torch.save(state, temporary / LEARNER_STATE)
        for old in sorted(self.checkpoints.glob("step-*"))[: -self.config.checkpoint.keep]:
            shutil.rmtree(old)

    def _settle(self) -> None:
        """Put the wall time that no stage has counted under "other", so that the stages add up to the run's."""
        wall_s = self.earlier_s + time.monotonic() - self.began
        self.seconds["other"] += wall_s - sum(self.seconds.values())

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] += time.monotonic() - start

    def finish(self, before: tuple[EvalResult, list[float]], after: tuple[EvalResult, list[float]]) -> dict[str, Any]:
        """Merge the samples, write summary.json and the report."""
        self.observer.stage("report")
        self.record.finish_samples()
        (first, first_each), (last, last_each) = before, after
        metrics = read_metrics(self.record.run_dir)
        # A skipped step may have had no finite gap.
        gaps = [m["logprob_gap_mean"] for m in metrics if m.get("logprob_gap_mean") is not None]
        size = account_of(self.model.config).parameters
        self._settle()
        verdict, text = learning_or_sharpening(first, first_each, last, last_each)
        summary = {
            "pass_at_1_before": first.pass_at_1,
            "pass_at_1_after": last.pass_at_1,
            "pass_at_k_before": first.pass_at_k,
            "pass_at_k_after": last.pass_at_k,
            "k": last.k,
            "majority_at_k_before": first.majority_at_k,
            "majority_at_k_after": last.majority_at_k,
            "greedy_before": first.greedy,
            "greedy_after": last.greedy,
            "num_problems": last.num_problems,
            "num_samples": last.num_samples,
            "verifier_failures": first.num_failed + last.num_failed,
            "num_steps": self.config.num_steps,
            "wall_s": sum(self.seconds.values()),
            "seconds_by_stage": self.seconds,
            "logprob_gap_mean": statistics.fmean(gaps) if gaps else None,
            "logprob_gap_max": max(
                (m["logprob_gap_max"] for m in metrics if m.get("logprob_gap_max") is not None), default=None
            ),
            "skipped_steps": sum(m["skipped"] for m in metrics),
            "engine": self.config.engine.kind,
            "seed": self.config.seed,
            "model": {"total_params": size.total, "active_params": size.active},
            "verdict": verdict,
            "learning_or_sharpening": text,
            "checkpoint": str(latest_checkpoint(self.checkpoints)),
        }
        self.record.write_json("summary", summary)
        write_report(self.record.run_dir)
        return summary


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a run's checkpoints folder; None if there is none."""
    whole = [path for path in sorted(folder.glob("step-*")) if (path / LEARNER_STATE).is_file()]
    return whole[-1] if whole else None
