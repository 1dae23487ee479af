"""The loop: the only place that knows the order sample, score, advantage, loss, step, sync.

A little over 400 lines, because what a run keeps between steps (checkpoints, times, the stream) is read beside the loop.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from grpo.batch import Batch, build_batch
from grpo.config import TrainConfig
from grpo.held_out import HeldOut
from grpo.inputs import Inputs, score_pool
from grpo.learner import NonFiniteLossError
from grpo.learner_handle import open_learner
from grpo.measures import (
    VerifierFailureError,
    failures_in_words,
    is_informative,
    sample_metrics,
    with_advantages,
)
from grpo.objective import penalised_rewards
from grpo.report import write_report
from grpo.summary import run_summary
from policy.atomic import CheckpointError
from rollout.checkpoints import Checkpoints, latest_checkpoint
from rollout.cluster import running_cluster, running_engines
from rollout.durable import write_json
from rollout.engine import Engine, SamplingParams
from rollout.errors import UserError
from rollout.evaluation import EvalResult
from rollout.interrupt import RunInterrupted, stop_on_signal
from rollout.journal import RolloutJournal
from rollout.records import Group
from rollout.run import Observer, RunRecord, read_metrics
from rollout.sampling import GroupStream, Prompter, StepRollout
from rollout.tokenizer import load_tokenizer, stop_ids
from rollout.trackers import Trackers
from rollout.weights import WeightSync
from verifiers.pool import ScorePool

RUN_STATE = "run.json"
STAGES = ("base", "start", "eval", "sampling", "scoring", "learning", "sync", "other")


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
    """Run, or take up again, GRPO from the checkpoint `base_dir` and return the summary, which is in the run folder too.

    `began` is the `time.monotonic()` from which the run's wall time counts (default: now), `base_s` what of it went into
    making the base.

    On SIGINT or SIGTERM the run finishes its step, saves, and raises RunInterrupted; a second one stops at once.
    """
    torch.set_num_threads(config.learner.num_threads)
    needs_cluster = "ray" in (config.engine.placement, config.learner.placement)
    with stop_on_signal() as stop, score_pool(config, record.log_path("verifiers")) as pool:
        started = time.monotonic()
        run = _Run(config, base_dir, inputs, pool, record, observer, began=started - base_s if began is None else began)
        run.seconds["base"] += base_s
        observer.stage(
            "start",
            f"{config.engine.num_engines} {config.engine.kind} engine(s), {config.engine.placement}; "
            f"{config.learner.num_ranks} learner(s), {config.learner.placement}",
        )
        with (
            running_cluster(record.run_dir / "logs", needed=needs_cluster),
            run.opened(),
            running_engines(config.engine, run.weights_dir, record.run_dir / "logs", seed=config.seed) as engine,
        ):
            run.connect(engine)
            run.seconds["start"] += time.monotonic() - run.began - base_s
            with run.timed("eval"):
                before = run.held_out.before()
            run.loop(stop)
            if stop.is_set():
                raise RunInterrupted(f"stopped before the last measurement; go on with\n  {record.command_to_resume}")
            with run.timed("eval"):
                after = run.held_out.after()
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
        self.checkpoints = Checkpoints(record.run_dir / "checkpoints", config.checkpoint, observer.message)
        self.journal = RolloutJournal(record.run_dir / "rollouts", observer.message)
        self.resumed_from = self.checkpoints.latest()
        if self.resumed_from is None and base_dir.parent == self.checkpoints.folder:
            raise UserError(
                f"no checkpoint in {self.checkpoints.folder} is sound any more. The same command again begins with the base:\n"
                f"  {record.command_to_resume}"
            )
        self.weights_dir = self.resumed_from or base_dir
        self.tokenizer = load_tokenizer(self.weights_dir)
        self.stop_ids = stop_ids(self.tokenizer)
        self.first_step = 0
        self.state: dict[str, Any] = {}
        if self.resumed_from is not None:
            self.state = _run_state(self.resumed_from)
            self.first_step = self.state["step"]
            self.seconds |= self.state["seconds"]
            self.earlier_s = sum(self.seconds.values())
            observer.message(f"going on at step {self.first_step} from {self.resumed_from}")
        elif record.resumed:
            observer.message(
                "the run has no checkpoint yet: it begins at step 0 again, with the samples that were kept"
            )
        if record.resumed:
            record.truncate(self.first_step)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The learner and the trackers, for as long as the block runs."""
        config, record = self.config, self.record
        bad_batch_path, log_dir = record.run_dir / "bad_batch.pt", record.run_dir / "logs"
        with closing(
            open_learner(config, self.weights_dir, bad_batch_path=bad_batch_path, log_dir=log_dir)
        ) as self.learner:
            if self.resumed_from is not None:
                self.learner.load_state(self.resumed_from)
            self.prompter = self._prompter()
            self.trackers = Trackers(
                config.tracking.trackers,
                config.tracking.project,
                record.run_dir.name,
                record.run_dir / "trackers",
                config.model_dump(mode="json"),
                self.observer.message,
                first_step=self.first_step,
            )
            with closing(self.trackers):
                yield

    def _prompter(self) -> Prompter:
        config = self.config
        context = self.learner.policy_config.max_position_embeddings
        if config.engine.max_model_len > context:
            raise UserError(
                f"engine.max_model_len={config.engine.max_model_len} exceeds the policy's context of {context} tokens."
            )
        prompter = Prompter(self.tokenizer, config.template, config.engine.max_model_len, config.sampling.longest)
        # Every prompt of a finite data set is checked now; an endless generator is sampled.
        count = min(len(self.inputs.source), 100_000) if config.data.source != "generator" else 64
        for task in itertools.chain(self.inputs.eval_tasks, map(self.inputs.source.task, range(count))):
            prompter.ids(task)
        return prompter

    def connect(self, engine: Engine) -> None:
        """Take the engine into use and prove that it computes what the learner computes."""
        config = self.config
        kinds = {config.engine.dtype, config.learner.dtype, config.learner.precision}
        self.sync = WeightSync(
            engine,
            vocab_size=self.learner.policy_config.vocab_size,
            engine_dtype="bfloat16" if {"bfloat16", "fp8"} & kinds else "float32",
            config=config.sync,
        )
        self.sync.publish(self.learner, self.first_step)
        resample = config.algorithm.zero_variance_groups == "resample"
        self.stream = GroupStream(
            engine,
            self.inputs.source,
            self.prompter,
            self.pool,
            params_at=self._params_at,
            num_prompts=config.num_prompts,
            group_size=config.group_size,
            seed=config.seed,
            num_prompts_per_call=config.sampling.num_prompts_per_call,
            is_informative=(lambda group: is_informative(group, config)) if resample else None,
            max_draws=config.algorithm.max_draws_per_step,
            journal=self.journal,
        )
        if self.state:
            self.stream.load_state_dict(self.state["stream"])
        self.held_out = HeldOut(
            config=config,
            tasks=self.inputs.eval_tasks,
            engine=engine,
            prompter=self.prompter,
            pool=self.pool,
            record=self.record,
            observer=self.observer,
            stop_token_ids=self.stop_ids,
        )

    def _params_at(self, step: int) -> SamplingParams:
        sampling = self.config.sampling
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_completion_tokens=sampling.max_tokens_at(step),
            stop_token_ids=self.stop_ids,
            return_sampling_mask=self.config.algorithm.sampling_mask_replay,
        )

    def loop(self, stop: threading.Event) -> None:
        """Every step from where the run stands, with checkpoints; what goes wrong in a step leaves the last one saved."""
        config = self.config
        self.observer.stage("train", f"{config.num_prompts} prompts x {config.group_size} samples")
        with self.checkpoints:
            for step in range(self.first_step, config.num_steps):
                if stop.is_set():
                    self._save(step)
                    self.checkpoints.wait()
                    raise RunInterrupted(f"stopped before step {step}; go on with\n  {self.record.command_to_resume}")
                self.checkpoints.check()
                metrics = self._step(step)
                done, score = step + 1, None
                if config.eval.every_steps and done % config.eval.every_steps == 0:
                    with self.timed("eval"):
                        score = metrics["eval_pass_at_1"] = self.held_out.quick()
                self.record.record(metrics)
                self.trackers.log(step, metrics)
                self.observer.step(done, config.num_steps, metrics)
                if done % config.checkpoint.every_steps == 0 or done == config.num_steps:
                    self._save(done, score)

    def _step(self, step: int) -> dict[str, Any]:
        """Sample, score, learn and sync once."""
        start = time.monotonic()
        rollout = self.stream.next_groups(step)
        self._check_verdicts(rollout, step)
        groups = with_advantages(rollout.groups, self.config)
        self._write_samples(step, groups, rollout)
        learning = time.monotonic()
        learned = self._learn(groups, step)
        syncing = time.monotonic()
        report = self.sync.publish(self.learner, step + 1)
        synced = time.monotonic()
        seconds = {
            "sampling": rollout.seconds_sampling,
            "scoring": rollout.seconds_scoring,
            "learning": syncing - learning,
            "sync": synced - syncing,
        }
        total = time.monotonic() - start
        seconds["other"] = total - sum(seconds.values())
        for stage in ("sampling", "scoring", "learning", "sync"):
            self.seconds[stage] += seconds[stage]
        sampled = [*groups, *with_advantages(rollout.uninformative, self.config)]
        measured = sample_metrics(sampled, [reward.name for reward in self.config.rewards])
        return {
            "step": step,
            "policy_version": step + 1,
            **measured,
            "num_draws": rollout.num_draws,
            "num_reused_samples": rollout.num_reused,
            **learned,
            "probe_gap": report.probe_gap,
            "tokens_per_s": measured["completion_tokens_total"] / total,
            "sampling_tokens_per_s": measured["completion_tokens_total"] / max(seconds["sampling"], 1e-9),
            **{f"seconds_{stage}": value for stage, value in seconds.items()},
            "seconds_total": total,
        }

    def _learn(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """One step of the learner on the groups that have something to teach."""
        algorithm = self.config.algorithm
        if algorithm.zero_variance_groups == "drop":
            groups = [group for group in groups if any(sample.advantage for sample in group.samples)]
        samples = [sample for group in groups for sample in group.samples]
        nothing = "" if samples else "no group had two different rewards"
        if samples and algorithm.mask_truncated and all(sample.finish_reason == "length" for sample in samples):
            nothing = "every completion was cut off at the length limit, and algorithm.mask_truncated leaves those out"
        if nothing:
            self.observer.message(f"step {step}: {nothing}, so there was nothing to learn from")
            return {"skipped": 0, "num_learned_samples": 0} | self.learner.step(None, step)
        batch = build_batch(samples, [sample.advantage or 0.0 for sample in samples])
        try:
            if algorithm.kl_placement == "reward" and algorithm.kl_coef > 0:
                batch = self._kl_in_reward(self.learner.fill(batch), groups)
            learned = self.learner.step(batch, step)
        except NonFiniteLossError as error:
            skipped = self.config.learner.num_minibatches
            self.record.record({"step": step, "skipped": skipped, "stopped": str(error)})
            kept = latest_checkpoint(self.checkpoints.folder)
            raise NonFiniteLossError(
                f"step {step}: {error} The newest checkpoint is {kept or 'not there yet'}. To go on from it, with the same "
                f"samples again:\n  {self.record.command_to_resume}"
            ) from error
        return learned | {"num_learned_samples": len(samples)}

    def _kl_in_reward(self, batch: Batch, groups: Sequence[Group]) -> Batch:
        """The batch with advantages of rewards that have the KL to the reference taken off."""
        samples = [sample for group in groups for sample in group.samples]
        scores = [sample.verdict.score if sample.verdict else 0.0 for sample in samples]
        assert batch.old_logprobs is not None
        assert batch.ref_logprobs is not None
        rewards = penalised_rewards(
            torch.tensor(scores, dtype=torch.float64),
            batch.old_logprobs,
            batch.ref_logprobs,
            batch.completion_mask,
            batch.sequence_ids,
            self.config.algorithm,
        )
        penalised = with_advantages(groups, self.config, rewards.tolist())
        values = [sample.advantage or 0.0 for group in penalised for sample in group.samples]
        return batch.with_advantages(values)

    def _check_verdicts(self, rollout: StepRollout, step: int) -> None:
        """Report the step's verifier failures; too many stop the run, with everything up to this step saved."""
        groups = [*rollout.groups, *rollout.uninformative]
        try:
            failures = failures_in_words(groups, f"step {step}", self.config.scoring.max_error_share)
        except VerifierFailureError as error:
            self._save(step)
            self._write_samples(step, rollout.groups, rollout)
            raise VerifierFailureError(
                f"{error} The state before this step is saved; go on with\n  {self.record.command_to_resume}"
            ) from error
        if failures:
            self.observer.message(failures)

    def _write_samples(self, step: int, groups: Sequence[Group], rollout: StepRollout) -> None:
        """Every sample of the step; those that were not learned from have no advantage."""
        every = [*groups, *rollout.uninformative]
        self.record.write_samples(step, every, "train", [self.prompter.text(group.task) for group in every])

    def _save(self, step: int, score: float | None = None) -> None:
        """A checkpoint of the state before `step`: Hugging Face files and the learner's state, whole or not at all."""
        self._settle()
        write_learner = self.learner.snapshot(step)
        state = {"step": step, "seconds": dict(self.seconds), "stream": self.stream.state_dict(step)}

        def write(folder: Path) -> None:
            write_learner(folder)
            self.tokenizer.save_pretrained(folder)
            write_json(folder / RUN_STATE, state)

        self.checkpoints.save(
            step,
            write,
            needed_bytes=self.learner.num_bytes,
            score=score,
            background=self.config.checkpoint.asynchronous and self.learner.can_write_in_background,
            on_saved=lambda _: self.journal.prune(state["stream"]["next_draw"]),
        )

    def _settle(self) -> None:
        """Put the wall time that no stage has counted under "other", so that the stages add up to the run's."""
        wall_s = self.earlier_s + time.monotonic() - self.began
        self.seconds["other"] += wall_s - sum(self.seconds.values())

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the block's time as that of `stage`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] += time.monotonic() - start

    def finish(self, before: tuple[EvalResult, list[float]], after: tuple[EvalResult, list[float]]) -> dict[str, Any]:
        """Merge the samples, write summary.json and the report."""
        self.observer.stage("report")
        self.record.finish_samples()
        self._settle()
        summary = run_summary(
            self.config,
            self.learner.policy_config,
            read_metrics(self.record.run_dir),
            before,
            after,
            self.seconds,
            latest_checkpoint(self.checkpoints.folder),
        )
        self.journal.remove()
        self.record.write_json("summary", summary)
        write_report(self.record.run_dir)
        self.trackers.close(summary)
        return summary


def _run_state(checkpoint: Path) -> dict[str, Any]:
    """What the run itself saved; CheckpointError where a checkpoint without a manifest has lost it."""
    path = checkpoint / RUN_STATE
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} can't be read ({error}): remove {checkpoint}, and the one before it is used"
        ) from error
