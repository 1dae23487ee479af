"""The config of a student's run: which model learns, from which traces, how, and what it is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from distill.lora import LoraConfig
from distill.sft import check_shape
from policy.layer_groups import LAYER_GROUPS
from rollout.checkpoints import CheckpointConfig
from rollout.engine_config import EngineConfig
from rollout.tasks import DataConfig
from rollout.templates import check_template
from rollout.trackers import TrackingConfig
from rollout.weights import SyncConfig


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StudentSource(_Table):
    """The model that learns: exactly one of `init`, `sft_config` and `model`."""

    init: Path | None = Field(default=None, description="checkpoint folder in Hugging Face format, with its tokenizer")
    sft_config: Path | None = Field(
        default=None, description="config of the supervised run that makes the student's base (cached)"
    )
    model: Annotated[dict[str, Any], AfterValidator(check_shape)] | None = Field(
        default=None,
        description="shape of a new student: model_type and the fields of a dense model, or PolicyConfig's but vocab_size",
    )
    tokenizer: Path | None = Field(default=None, description="folder with the tokenizer of a new student")
    config_changes: dict[str, Any] = Field(
        default_factory=dict,
        description="values of a checkpoint's config.json to replace, such as max_position_embeddings",
    )

    @model_validator(mode="after")
    def _one(self) -> StudentSource:
        given = [name for name in ("init", "sft_config", "model") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"set exactly one of init, sft_config and model, not {' and '.join(given) or 'none'}")
        if (self.model is None) != (self.tokenizer is None):
            raise ValueError("tokenizer goes with model: a new student needs one, a checkpoint has its own")
        if self.model is not None and self.config_changes:
            raise ValueError("config_changes goes with init or sft_config: write these values into model")
        return self


class StudentDataConfig(_Table):
    """The traces and what of them is learned."""

    path: Path = Field(description="traces.parquet, or a folder of its parts")
    max_traces: int | None = Field(default=None, ge=1, description="use only the first so many traces")
    max_tokens: int = Field(ge=2, description="longest prompt and completion together, in tokens")
    overlong: Literal["drop", "truncate"] = Field(
        default="drop", description="longer traces are dropped, or cut off at max_tokens (then without an end token)"
    )
    keep_faulty: bool = Field(
        default=False,
        description="also learn traces with a fault of form, and cut-off ones (without an end token); else they are dropped",
    )
    loss_on: Literal["completion", "all"] = Field(
        default="completion", description="tokens that are learned: the completion's, or the prompt's too"
    )


def _known_groups(scale: dict[str, float]) -> dict[str, float]:
    if unknown := sorted(set(scale) - set(LAYER_GROUPS)):
        raise ValueError(f"{unknown} are not layer groups; these are: {', '.join(LAYER_GROUPS)}")
    if bad := sorted(name for name, value in scale.items() if not value >= 0):
        raise ValueError(f"the factors of {bad} must not be negative")
    return scale


class TrainerConfig(_Table):
    """The optimizer, AdamW: the rate rises linearly, then falls along a cosine."""

    lr: float = Field(gt=0, allow_inf_nan=False, description="highest learning rate")
    lr_scale: Annotated[dict[str, float], AfterValidator(_known_groups)] = Field(
        default_factory=dict,
        description="factor on lr by layer group: norms, head, embedding, attention, router, experts, ...",
    )
    warmup_share: float = Field(default=0.0, ge=0, lt=1, description="share of all optimizer steps that is warm-up")
    final_lr_share: float = Field(default=0.1, ge=0, le=1, description="what the cosine falls to, as a share of lr")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), description="AdamW's betas"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay; norm gains never decay")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are scaled down to this norm")
    balance_gamma: float = Field(
        default=0.0, ge=0, description="step of the routing biases towards even load; 0 leaves them as they are"
    )
    balance_alpha: float = Field(
        default=0.0, ge=0, description="weight of the sequence-wise balance loss (DeepSeek-V3: 1e-4)"
    )
    mtp_loss_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of multi-token prediction, where the student has it (DeepSeek-V3: 0.3, later 0.1)",
    )
    activation_checkpointing: bool = Field(
        default=False, description="keep each layer's input only and compute the rest again: less memory, more time"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="type of the products; weights and optimizer states are float32 in both"
    )
    placement: Literal["in_process", "ray"] = Field(
        default="in_process", description="ray: each trainer process is a Ray actor; in_process: one, this one"
    )
    num_ranks: int = Field(default=1, ge=1, description="trainer processes that share the student (FSDP2)")
    expert_parallel: int = Field(default=1, ge=1, description="processes that a layer's experts are split over")
    step_timeout_s: float = Field(
        default=3600.0, gt=0, description="longest call of the trainer processes, in seconds (placement=ray)"
    )
    max_tokens_per_microbatch: int = Field(
        default=8192, ge=1, description="tokens in one forward pass; a matter of memory only"
    )
    num_threads: int = Field(default=2, ge=1, description="CPU threads of each process")
    max_skipped_steps: int = Field(
        default=3, ge=1, description="the run stops after so many optimizer steps in a row without a finite loss"
    )

    @model_validator(mode="after")
    def _ranks(self) -> TrainerConfig:
        if self.placement == "in_process" and self.num_ranks != 1:
            raise ValueError(f"num_ranks={self.num_ranks} needs placement = 'ray'")
        if self.num_ranks % self.expert_parallel:
            raise ValueError(f"expert_parallel={self.expert_parallel} does not divide num_ranks={self.num_ranks}")
        return self

    @property
    def is_spread(self) -> bool:
        """Whether the student is sharded by FSDP2, over several ranks or, for half precision, over one."""
        return self.placement == "ray" or self.dtype != "float32"


class StudentEvalConfig(_Table):
    """The measurement on held-out tasks before, after and, if wished, while training."""

    data: DataConfig = Field(description="held-out tasks")
    verifier: str = Field(default="math", description="what judges a completion: a name or 'package.module:attribute'")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the verifier")
    num_workers: int = Field(default=2, ge=1, description="verifier processes")
    timeout_s: float = Field(default=5.0, gt=0, description="longest time for one sample, in seconds")
    num_problems: int = Field(default=128, ge=1, description="how many tasks, from the first")
    num_samples: int = Field(default=4, ge=1, description="samples per problem; pass@1 is their mean")
    k: int = Field(default=4, ge=1, description="k of pass@k (unbiased) and of majority@k")
    temperature: float = Field(default=0.6, gt=0, description="softmax temperature")
    top_p: float = Field(default=0.95, gt=0, le=1, description="nucleus sampling")
    max_completion_tokens: int = Field(default=256, ge=1, description="longest completion, in tokens")
    every_steps: int = Field(
        default=0, ge=0, description="also measure pass@1 with one sample each every so many steps; 0: never"
    )

    @model_validator(mode="after")
    def _k_of_n(self) -> StudentEvalConfig:
        if self.k > self.num_samples:
            raise ValueError(f"k={self.k} needs num_samples of at least that, not {self.num_samples}")
        return self


class DistillConfig(_Table):
    """A student's run on traces."""

    name: str = Field(min_length=1, description="name of the run")
    seed: int = Field(default=0, ge=0, description="seed of new weights, of the order of traces and of sampling")
    run_dir: str = Field(default="runs/{name}-{seed}", description="the run's folder; {name} and {seed} are filled in")
    template: Annotated[str, AfterValidator(check_template)] = Field(
        default="chat",
        description="prompt template: chat (the student's own), r1_zero, plain, or a text with {question} in it",
    )
    num_traces: int = Field(ge=1, description="traces per optimizer step")
    num_epochs: int = Field(default=1, ge=1, description="times that every trace is learned from")
    max_steps: int | None = Field(
        default=None, ge=1, description="optimizer steps at most; the cosine then ends there. By default all epochs"
    )
    student: StudentSource = Field(description="the model that learns")
    data: StudentDataConfig = Field(description="the traces")
    trainer: TrainerConfig = Field(description="the optimizer")
    lora: LoraConfig | None = Field(default=None, description="learn low-rank adapters instead of all weights")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="the engine that samples for measurements")
    sync: SyncConfig = Field(default_factory=SyncConfig, description="verification of the engine's weights")
    eval: StudentEvalConfig | None = Field(default=None, description="held-out measurement; without it, none")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="checkpoints")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="trackers beside metrics.jsonl")

    @model_validator(mode="after")
    def _fits_together(self) -> DistillConfig:
        if self.trainer.max_tokens_per_microbatch < self.data.max_tokens:
            raise ValueError(
                f"trainer.max_tokens_per_microbatch={self.trainer.max_tokens_per_microbatch} must hold the longest trace, "
                f"data.max_tokens={self.data.max_tokens} tokens"
            )
        if self.eval and self.eval.max_completion_tokens >= self.engine.max_model_len:
            raise ValueError(
                f"eval.max_completion_tokens={self.eval.max_completion_tokens} leaves no room for a prompt in "
                f"engine.max_model_len={self.engine.max_model_len}"
            )
        if self.lora and self.trainer.is_spread:
            raise ValueError("lora needs trainer.dtype = 'float32' and trainer.placement = 'in_process'")
        if self.checkpoint.keep_best and not (self.eval and self.eval.every_steps):
            raise ValueError("checkpoint.keep_best needs eval.every_steps, to have scores to go by")
        return self

    @property
    def run_path(self) -> Path:
        """The run's folder."""
        return Path(self.run_dir.replace("{name}", self.name).replace("{seed}", str(self.seed)))
