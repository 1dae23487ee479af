"""A student's run: tokenised traces, optimizer steps, measurements and checkpoints, taken up again exactly where it was left."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from distill.student_batches import Batches, TraceBatches
from distill.student_config import DistillConfig
from distill.student_data import Encoder, open_store
from distill.student_eval import StudentEval, eval_pool, eval_tasks
from distill.student_handle import StudentHandle, first_folder, open_student
from distill.student_loss import StudentLoss, SupervisedLoss
from policy.account import account_of
from rollout.checkpoints import Checkpoints, latest_checkpoint
from rollout.cluster import running_cluster, running_engines
from rollout.durable import write_json
from rollout.engine import Engine
from rollout.errors import UserError
from rollout.evaluation import EvalResult
from rollout.interrupt import RunInterrupted, stop_on_signal
from rollout.records import Task
from rollout.run import Observer, RunRecord
from rollout.sampling import Prompter
from rollout.tokenizer import load_tokenizer, stop_ids
from rollout.trackers import Trackers
from rollout.weights import WeightSync

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from verifiers.pool import ScorePool

RUN_STATE = "run.json"
STAGES = ("start", "tokens", "eval", "batch", "learning", "other")


class Method(Protocol):
    """How a student learns: which batches, by which loss. A run asks for the loss before its student is there."""

    @property
    def needs_engine(self) -> bool:
        """Whether its batches are sampled from the student."""
        ...

    def loss(self, config: DistillConfig) -> StudentLoss:
        """What the student minimises; it is sent to every rank."""
        ...

    def batches(self, run: StudentRun) -> Batches:
        """The run's batches; asked before the student is made, as their number decides the schedule.

        What they need of the run's student, engine and sync is there when the first batch is asked for.
        """
        ...


@dataclass(frozen=True)
class Supervised:
    """Next-token prediction on the traces."""

    needs_engine: bool = False

    def loss(self, config: DistillConfig) -> StudentLoss:
        """Negative log-likelihood, with the auxiliary losses of the config."""
        return SupervisedLoss(config.trainer.mtp_loss_weight, config.trainer.balance_alpha)

    def batches(self, run: StudentRun) -> Batches:
        """The traces in shuffled epochs."""
        config = run.config
        encoder = Encoder(run.tokenizer, config.template, config.data)
        run.observer.stage("tokens", str(config.data.path))
        with run.timed("tokens"):
            store = open_store(
                run.record.run_dir / "tokens",
                encoder,
                lambda done: run.observer.stage("tokens", f"{done} traces") if done % 6400 == 0 else None,
            )
        counts = store.counts
        run.record.write_json("data", counts)
        dropped = "".join(f"; {count} dropped: {reason}" for reason, count in counts["dropped"].items())
        run.observer.message(f"{counts['num_used']} of {counts['num_traces']} traces are learned from{dropped}")
        return TraceBatches(
            store,
            seed=config.seed,
            num_traces=config.num_traces,
            num_epochs=config.num_epochs,
            max_steps=config.max_steps,
            loss_on_prompt=config.data.loss_on == "all",
        )


def distill(
    config: DistillConfig,
    base: Path | None,
    record: RunRecord,
    observer: Observer,
    *,
    method: Method | None = None,
    base_s: float = 0.0,
) -> dict[str, Any]:
    """Train a student, or take its run up again, and return the summary, which is in the run folder too.

    `base` is the folder of the student's first weights, None for a new one of the config's shape. On SIGINT or SIGTERM
    the run finishes its step, saves, and raises RunInterrupted; a second one stops at once.
    """
    torch.set_num_threads(config.trainer.num_threads)
    tasks = eval_tasks(config.eval) if config.eval else []
    with stop_on_signal() as stop, eval_pool(config.eval, record.log_path("verifiers")) as pool:
        run = StudentRun(config, base, record, observer, method or Supervised(), base_s=base_s)
        with run.opened(tasks, pool):
            before = run.measure_before()
            run.loop(stop)
            if stop.is_set() and config.eval:
                raise RunInterrupted(f"stopped before the last measurement; go on with\n  {record.command_to_resume}")
            return run.finish(before, run.measure_after())


class StudentRun:
    """The state of one run between its steps; `student`, `engine`, `sync` and `prompter` are there while it is `opened`."""

    def __init__(
        self,
        config: DistillConfig,
        base: Path | None,
        record: RunRecord,
        observer: Observer,
        method: Method,
        *,
        base_s: float = 0.0,
    ) -> None:
        self.config, self.base, self.record, self.observer, self.method = config, base, record, observer, method
        self.began = time.monotonic() - base_s
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0) | {"start": base_s}
        self.earlier_s = 0.0  # wall time of the run before this process took it up
        self.first_step = 0
        self.evaluation: StudentEval | None = None
        self.synced_step: int | None = None  # the step whose weights the engine has
        self.checkpoints = Checkpoints(record.run_dir / "checkpoints", config.checkpoint, observer.message)
        self.resumed_from = self.checkpoints.latest()
        if self.resumed_from is not None:
            state = json.loads((self.resumed_from / RUN_STATE).read_text())
            self.first_step = state["step"]
            self.seconds |= state["seconds"]
            self.earlier_s = sum(self.seconds.values())
            self.began = time.monotonic()
            observer.message(f"going on at step {self.first_step} from {self.resumed_from}")
        if record.resumed:
            record.truncate(self.first_step)
        self.tokenizer = self._tokenizer()

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        folder = self.resumed_from or self.base or self.config.student.tokenizer
        assert folder is not None  # the config's own check
        return load_tokenizer(folder)

    @contextmanager
    def opened(self, tasks: list[Task], pool: ScorePool | None) -> Iterator[None]:
        """The student, the trackers and, where something is sampled, the engine, for as long as the block runs."""
        config, logs = self.config, self.record.run_dir / "logs"
        samples = config.eval is not None or self.method.needs_engine
        ray = config.trainer.placement == "ray" or (samples and config.engine.placement == "ray")
        with ExitStack() as stack:
            stack.enter_context(running_cluster(logs, needed=ray))
            self.batches = self.method.batches(self)
            with self.timed("start"):
                first = self.record.run_dir / "first"
                self.first_folder = first_folder(config, self.base, first, self.tokenizer)
                self.student = self._open_student(logs)
                stack.callback(self.student.close)
                self._check_lengths()
                self.trackers = self._open_trackers()
                stack.callback(self.trackers.close)
                if samples:
                    folder = self.resumed_from or self.first_folder
                    engine = stack.enter_context(running_engines(config.engine, folder, logs, seed=config.seed))
                    self._connect(engine, tasks, pool)
            yield

    def _open_student(self, logs: Path) -> StudentHandle:
        run_dir = self.record.run_dir
        return open_student(
            self.config,
            self.first_folder,
            self.resumed_from,
            self.method.loss(self.config),
            num_steps=self.batches.num_steps,
            bad_batch_path=run_dir / "bad_batch.pt",
            log_dir=logs,
        )

    def _check_lengths(self) -> None:
        context = self.student.policy_config.max_position_embeddings
        samples = self.config.eval is not None or self.method.needs_engine
        for name, length in (
            ("data.max_tokens", self.config.data.max_tokens),
            ("engine.max_model_len", self.config.engine.max_model_len if samples else 0),
        ):
            if length > context:
                raise UserError(
                    f"{name}={length} exceeds the student's context of {context} tokens. Lower it, or lengthen the context: "
                    f"student.config_changes.max_position_embeddings={length}"
                )

    def _open_trackers(self) -> Trackers:
        config, run_dir = self.config, self.record.run_dir
        return Trackers(
            config.tracking.trackers,
            config.tracking.project,
            run_dir.name,
            run_dir / "trackers",
            config.model_dump(mode="json"),
            self.observer.message,
            first_step=self.first_step,
        )

    def _connect(self, engine: Engine, tasks: list[Task], pool: ScorePool | None) -> None:
        config = self.config
        self.engine, self.stop_token_ids = engine, stop_ids(self.tokenizer)
        self.sync = WeightSync(
            engine,
            vocab_size=self.student.policy_config.vocab_size,
            engine_dtype="bfloat16" if "bfloat16" in (config.engine.dtype, config.trainer.dtype) else "float32",
            config=config.sync,
        )
        if config.eval is None or pool is None:
            return
        prompter = Prompter(
            self.tokenizer, config.template, config.engine.max_model_len, config.eval.max_completion_tokens
        )
        for task in tasks:
            prompter.ids(task)
        self.evaluation = StudentEval(
            config=config,
            options=config.eval,
            tasks=tasks,
            engine=engine,
            prompter=prompter,
            pool=pool,
            record=self.record,
            observer=self.observer,
            stop_token_ids=self.stop_token_ids,
        )

    def publish(self, step: int) -> None:
        """Give the engine the weights before `step`, unless it has them, and prove that it computes with them."""
        if self.synced_step != step:
            self.sync.publish(self.student, step)
            self.synced_step = step

    def measure_before(self) -> EvalResult | None:
        """The student as it begins; None where nothing is measured, or where only its later weights are there."""
        if self.evaluation is None:
            return None
        with self.timed("eval"):
            if self.first_step == 0:
                self.publish(0)
            elif not (self.record.run_dir / "eval_before.json").exists():
                raise UserError(f"{self.record.run_dir}/eval_before.json is missing: begin the run anew")
            return self.evaluation.before()

    def measure_after(self) -> EvalResult | None:
        """The trained student; None where nothing is measured."""
        if self.evaluation is None:
            return None
        with self.timed("eval"):
            self.publish(self.batches.num_steps)
            return self.evaluation.after(self.batches.num_steps)

    def loop(self, stop: threading.Event) -> None:
        """Every step from where the run stands, with checkpoints."""
        config, num_steps = self.config, self.batches.num_steps
        size = account_of(self.student.policy_config).parameters
        self.observer.stage("distill", f"{size.total / 1e6:.2f}M parameters, {num_steps} steps")
        with self.checkpoints:
            for step in range(self.first_step, num_steps):
                if stop.is_set():
                    self._save(step)
                    self.checkpoints.wait()
                    raise RunInterrupted(f"stopped before step {step}; go on with\n  {self.record.command_to_resume}")
                metrics, done, score = self._step(step), step + 1, None
                if (every := config.eval.every_steps if config.eval else 0) and done % every == 0:
                    score = metrics["eval_pass_at_1"] = self._quick(done)
                self.record.record(metrics)
                self.trackers.log(step, metrics)
                self.observer.step(done, num_steps, metrics)
                if done % config.checkpoint.every_steps == 0 or done == num_steps:
                    self._save(done, score)

    def _step(self, step: int) -> dict[str, Any]:
        start = time.monotonic()
        batch = self.batches.batch(step)
        learning = time.monotonic()
        metrics = self.student.step(batch, step)
        end = time.monotonic()
        self.seconds["batch"] += learning - start
        self.seconds["learning"] += end - learning
        return {
            "step": step,
            **metrics,
            "tokens_per_s": metrics["num_tokens"] / max(end - start, 1e-9),
            "seconds_batch": learning - start,
            "seconds_learning": end - learning,
            "seconds_total": end - start,
        }

    def _quick(self, step: int) -> float:
        assert self.evaluation is not None
        with self.timed("eval"):
            self.publish(step)
            return self.evaluation.quick()

    def _save(self, step: int, score: float | None = None) -> None:
        """A checkpoint of the state before `step`: Hugging Face files and the trainer's state, whole or not at all."""
        self._settle()
        write_student = self.student.snapshot()
        state = {"step": step, "seconds": dict(self.seconds)}

        def write(folder: Path) -> None:
            write_student(folder)
            self.tokenizer.save_pretrained(folder)
            write_json(folder / RUN_STATE, state)

        self.checkpoints.save(
            step,
            write,
            needed_bytes=self.student.num_bytes,
            score=score,
            background=self.config.checkpoint.asynchronous and self.student.can_write_in_background,
        )

    def _settle(self) -> None:
        """Put the wall time that no stage has counted under "other", so that the stages add up to the run's."""
        self.seconds["other"] += self.earlier_s + time.monotonic() - self.began - sum(self.seconds.values())

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the block's time as that of `stage`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] += time.monotonic() - start

    def finish(self, before: EvalResult | None, after: EvalResult | None) -> dict[str, Any]:
        """Merge the samples and write summary.json."""
        if after is not None:
            self.record.finish_samples()
        size = account_of(self.student.policy_config).parameters
        self._settle()
        pairs = zip(("before", "after"), (before, after), strict=True)
        measured = {
            f"{key}_{when}": value for when, result in pairs if result for key, value in result.to_dict().items()
        }
        summary = {
            **measured,
            "num_steps": self.batches.num_steps,
            "wall_s": sum(self.seconds.values()),
            "seconds_by_stage": self.seconds,
            "seed": self.config.seed,
            "model": {"total_params": size.total, "active_params": size.active},
            "checkpoint": str(latest_checkpoint(self.checkpoints.folder)),
        }
        self.record.write_json("summary", summary)
        self.trackers.close(summary)
        return summary
