"""One side of `scripts.bench_step`: the job in TRL's GRPOTrainer, in a process of its own.

    python -m scripts.bench_step_trl JOB.json RESULT.json     # scripts.bench_step writes the job and runs this

It imports nothing of groupzero beside the reward, so that it runs in an environment that holds TRL alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from scripts.bench_step import digit_share


def grpo_config(job: dict[str, Any]) -> Any:
    """TRL's options for the job: the loss is `dapo` (token mean over the step), its fastest settings, no files."""
    from trl import GRPOConfig

    num_samples = job["num_prompts"] * job["group_size"]
    return GRPOConfig(
        output_dir=f"{job['folder']}/trl",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=job["seed"],
        shuffle_dataset=False,
        max_steps=job["num_steps"],
        per_device_train_batch_size=num_samples // job["trl_microbatches"],
        gradient_accumulation_steps=job["trl_microbatches"],
        num_generations=job["group_size"],
        max_completion_length=job["max_completion_tokens"],
        temperature=1.0,
        loss_type="dapo",
        scale_rewards="group",
        beta=job["kl_coef"],
        epsilon=job["clip_low"],
        epsilon_high=job["clip_high"],
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_beta1=job["betas"][0],
        adam_beta2=job["betas"][1],
        weight_decay=0.0,
        max_grad_norm=job["max_grad_norm"],
        model_init_kwargs={"dtype": "float32", "experts_implementation": job["trl_experts"]},
    )


def reward(completions: list[str], **_: Any) -> list[float]:
    """The job's reward, as TRL calls it."""
    return [digit_share(completion, None) for completion in completions]


def timed_trainer() -> type:
    """GRPOTrainer that keeps the seconds of its parts in `spent`, by name, summed over the run."""
    from trl import GRPOTrainer

    class TimedTrainer(GRPOTrainer):
        spent: defaultdict[str, float]

        def _timed(self, name: str, call: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.spent[name] += time.perf_counter() - start

        def _prepare_inputs(self, generation_batch: Any) -> Any:
            return self._timed("prepare", super()._prepare_inputs, generation_batch)

        def _generate(self, prompts: list) -> Any:
            return self._timed("sampling", super()._generate, prompts)

        def _calculate_rewards(self, *args: Any) -> Any:
            return self._timed("scoring", super()._calculate_rewards, *args)

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            import torch

            name = "gradient_pass" if torch.is_grad_enabled() else "reference"
            return self._timed(name, super()._get_per_token_logps_and_entropies, *args, **kwargs)

    return TimedTrainer


def step_clock(rows: list[dict[str, float]], trainer: Any) -> Any:
    """A callback that adds one row of seconds per step, from the end of the step before to its own end."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            spent, trainer.spent = trainer.spent, defaultdict(float)
            total, self.last = now - self.last, now
            # Between generation, rewards and reference: tokenizing, padding, decoding, advantages.
            other = spent["prepare"] - spent["sampling"] - spent["scoring"] - spent["reference"]
            learning = total - spent["sampling"] - spent["scoring"] - other
            rows.append(
                {
                    "total": total,
                    "sampling": spent["sampling"],
                    "scoring": spent["scoring"],
                    "learning": learning,
                    "sync": 0.0,
                    "other": other,
                }
            )

    return StepClock()


def run(job: dict[str, Any]) -> list[dict[str, float]]:
    """Train and return, per step, seconds by stage, the mean reward and the mean completion length in tokens."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    trainer = timed_trainer()(
        model=job["checkpoint"],
        reward_funcs=reward,
        args=grpo_config(job),
        train_dataset=Dataset.from_dict({"prompt": job["prompts"]}),
        processing_class=AutoTokenizer.from_pretrained(job["checkpoint"], local_files_only=True),
    )
    trainer.spent = defaultdict(float)
    rows: list[dict[str, float]] = []
    trainer.add_callback(step_clock(rows, trainer))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    for row, entry in zip(rows, logs, strict=True):
        row |= {
            "reward": entry["reward"],
            "completion_tokens": entry["completions/mean_length"],
            "loss": entry["loss"],
            "entropy": entry["entropy"],
            "grad_norm": entry["grad_norm"],
        }
    return rows


def main() -> None:
    """Run the job and write what was measured."""
    job = json.loads(Path(sys.argv[1]).read_text())
    import torch

    torch.set_num_threads(job["num_threads"])
    Path(sys.argv[2]).write_text(json.dumps(run(job)))


if __name__ == "__main__":
    main()
