"""The config of a GRPO run: values in TOML, every field described here, unknown keys and bad values refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from grpo.algorithm_config import AlgorithmConfig
from policy.layer_groups import LAYER_GROUPS
from rollout.checkpoints import CheckpointConfig
from rollout.cluster import EngineConfig
from rollout.tasks import DataConfig
from rollout.templates import check_template
from rollout.trackers import TrackingConfig
from rollout.weights import SyncConfig


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PolicySource(_Table):
    """Where the policy's first weights come from: exactly one of the two."""

    path: Path | None = Field(default=None, description="checkpoint folder in Hugging Face format, with its tokenizer")
    sft_config: Path | None = Field(
        default=None, description="config of the supervised run that makes the base model (cached)"
    )

    @model_validator(mode="after")
    def _one(self) -> PolicySource:
        if (self.path is None) == (self.sft_config is None):
            raise ValueError("set exactly one of policy.path and policy.sft_config")
        return self


class RewardConfig(_Table):
    """One part of the reward."""

    name: str = Field(min_length=1, description="name of the part in verdicts and metrics")
    verifier: str = Field(description="name (math, numeric, code, format, ...) or 'package.module:attribute'")
    weight: float = Field(default=1.0, allow_inf_nan=False, description="factor on this part's score")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the verifier; see docs/verifiers.md")
    timeout_s: float | None = Field(
        default=None, gt=0, description="time it needs for one sample, where that is more than scoring.timeout_s"
    )


class ScoringConfig(_Table):
    """The verifier processes."""

    num_workers: int = Field(default=2, ge=1, description="verifier processes")
    timeout_s: float = Field(
        default=5.0, gt=0, description="longest time for one sample, in seconds, from its start in the worker"
    )
    memory_limit_mb: int = Field(default=1024, ge=64, description="most memory of one verifier process, in MiB")
    max_error_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="the run stops when more than this share of a step's verdicts is error or timeout",
    )


class LengthCap(_Table):
    """A longest completion from some step on."""

    from_step: int = Field(ge=1, description="first step it holds for")
    max_completion_tokens: int = Field(ge=1, description="longest completion from there on, in tokens")


class TrainSamplingConfig(_Table):
    """How training samples are drawn."""

    temperature: float = Field(
        default=1.0, gt=0, description="softmax temperature, of the engine and of the learner alike"
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="nucleus sampling; below 1 needs algorithm.sampling_mask_replay"
    )
    top_k: int = Field(
        default=0, ge=0, description="sample from the k likeliest tokens, 0: all; needs algorithm.sampling_mask_replay"
    )
    max_completion_tokens: int = Field(default=256, ge=1, description="longest completion, in tokens")
    length_schedule: tuple[LengthCap, ...] = Field(
        default=(), description="longer limits from later steps on (R1-Zero: 32,768, from rollout step 512 on 65,536)"
    )
    num_prompts_per_call: int | None = Field(
        default=None,
        ge=1,
        description="prompts per call of the engines, scored while the next are sampled; finished calls outlive a killed "
        "run. By default all of a step",
    )

    @model_validator(mode="after")
    def _growing(self) -> TrainSamplingConfig:
        steps = [cap.from_step for cap in self.length_schedule]
        if steps != sorted(set(steps)):
            raise ValueError(f"length_schedule must be in the order of from_step, each once, not {steps}")
        lengths = [self.max_completion_tokens, *(cap.max_completion_tokens for cap in self.length_schedule)]
        if lengths != sorted(lengths):
            raise ValueError(f"length_schedule must grow from max_completion_tokens on, not {lengths}")
        return self

    def max_tokens_at(self, step: int) -> int:
        """The longest completion at a step (from 0)."""
        reached = [cap.max_completion_tokens for cap in self.length_schedule if cap.from_step <= step]
        return reached[-1] if reached else self.max_completion_tokens

    @property
    def longest(self) -> int:
        """The longest completion of the whole run."""
        return max([self.max_completion_tokens, *(cap.max_completion_tokens for cap in self.length_schedule)])


def _known_groups(scale: dict[str, float]) -> dict[str, float]:
    if unknown := sorted(set(scale) - set(LAYER_GROUPS)):
        raise ValueError(f"{unknown} are not layer groups; these are: {', '.join(LAYER_GROUPS)}")
    if bad := sorted(name for name, value in scale.items() if not value >= 0):
        raise ValueError(f"the factors of {bad} must not be negative")
    return scale


class LearnerConfig(_Table):
    """The optimizer and the cuts of a step's samples. A step's samples are num_prompts * group_size."""

    lr: float = Field(default=1e-6, gt=0, allow_inf_nan=False, description="learning rate of AdamW")
    lr_scale: Annotated[dict[str, float], AfterValidator(_known_groups)] = Field(
        default_factory=dict,
        description="factor on lr by layer group: norms, head, embedding, attention, router, experts, ...",
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), description="AdamW's betas"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay; norm gains never decay")
    warmup_steps: int = Field(default=0, ge=0, description="optimizer steps of linear warm-up")
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
        description="weight of the loss that keeps multi-token prediction a good draft; it moves those layers alone",
    )
    activation_checkpointing: bool = Field(
        default=False, description="keep each layer's input only and compute the rest again: less memory, more time"
    )
    num_minibatches: int = Field(
        default=1, ge=1, description="parts of a rollout step's samples, one optimizer step each (R1-Zero: 16)"
    )
    num_epochs: int = Field(default=1, ge=1, description="times that a rollout step's samples are learned from")
    num_ranks: int = Field(default=1, ge=1, description="learner processes that share the policy (FSDP2)")
    expert_parallel: int = Field(default=1, ge=1, description="processes that a layer's experts are split over")
    placement: Literal["in_process", "ray"] = Field(
        default="in_process", description="ray: each learner process is a Ray actor; in_process: one, this one"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="type of the products; weights and optimizer states are float32 in both"
    )
    precision: Literal["bf16", "fp8"] = Field(
        default="bf16",
        description="of the DeepSeek policy's projections and experts: that of dtype, or DeepSeek-V3's blockwise FP8 (a GPU "
        "of capability 9.0 or above; on a CPU its slow definition)",
    )
    offload_optimizer: bool = Field(
        default=False, description="keep the optimizer's states in main memory between optimizer steps"
    )
    step_timeout_s: float = Field(
        default=3600.0, gt=0, description="longest call of the learner processes, in seconds (placement=ray)"
    )
    max_tokens_per_microbatch: int = Field(
        default=8192, ge=1, description="tokens in one forward pass; a matter of memory only"
    )
    num_threads: int = Field(default=2, ge=1, description="CPU threads of the learner")
    max_skipped_steps: int = Field(
        default=3, ge=1, description="the run stops after so many optimizer steps in a row without a finite loss"
    )


class EvalConfig(_Table):
    """The measurement on held-out tasks before, after and, if wished, while training."""

    data: DataConfig = Field(description="held-out tasks")
    num_problems: int = Field(default=128, ge=1, description="how many of them, from the first")
    num_samples: int = Field(default=16, ge=1, description="samples per problem; pass@1 is their mean")
    k: int = Field(default=8, ge=1, description="k of pass@k (unbiased) and of majority@k")
    temperature: float = Field(default=1.0, gt=0, description="softmax temperature")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus sampling")
    every_steps: int = Field(
        default=0, ge=0, description="also measure pass@1 with one sample each every so many steps; 0: never"
    )

    @model_validator(mode="after")
    def _k_of_n(self) -> EvalConfig:
        if self.k > self.num_samples:
            raise ValueError(f"k={self.k} needs num_samples of at least that, not {self.num_samples}")
        return self


def _check_sampling_mask(config: TrainConfig) -> None:
    """ValueError unless tokens that sampling cuts off are cut off in the learner too, by what the engine returns."""
    cut_off = config.sampling.top_p < 1 or config.sampling.top_k > 0
    if cut_off and not config.algorithm.sampling_mask_replay:
        raise ValueError(
            "sampling.top_p and sampling.top_k cut tokens off, so the ratios would compare two distributions: "
            "set algorithm.sampling_mask_replay = true, or top_p = 1 and top_k = 0"
        )
    if config.algorithm.sampling_mask_replay and not cut_off:
        raise ValueError("algorithm.sampling_mask_replay has nothing to replay: set sampling.top_p or sampling.top_k")
    if cut_off and config.engine.kind == "vllm" and config.sampling.top_k == 0:
        raise ValueError(
            "vLLM tells which tokens it kept only where their number is bounded: set sampling.top_k (beside top_p), "
            "or engine.kind = 'torch'"
        )


def _check_ranks(learner: LearnerConfig) -> None:
    if learner.placement == "in_process" and learner.num_ranks != 1:
        raise ValueError(f"learner.num_ranks={learner.num_ranks} needs learner.placement = 'ray'")
    if learner.num_ranks % learner.expert_parallel:
        raise ValueError(
            f"learner.expert_parallel={learner.expert_parallel} does not divide learner.num_ranks={learner.num_ranks}"
        )


class TrainConfig(_Table):
    """A GRPO run."""

    name: str = Field(min_length=1, description="name of the run")
    seed: int = Field(default=0, ge=0, description="seed of the base model, of problems and of sampling")
    run_dir: str = Field(default="runs/{name}-{seed}", description="the run's folder; {name} and {seed} are filled in")
    num_steps: int = Field(ge=1, description="rollout steps")
    num_prompts: int = Field(ge=1, description="prompts per step")
    group_size: int = Field(ge=2, description="samples per prompt, relative to each other when scored")
    template: Annotated[str, AfterValidator(check_template)] = Field(
        default="r1_zero", description="prompt template: r1_zero, plain, chat, or a text with {question} in it"
    )
    policy: PolicySource = Field(description="the first weights")
    data: DataConfig = Field(description="training tasks")
    rewards: tuple[RewardConfig, ...] = Field(
        min_length=1, description="parts of the reward, summed by weight; the first one's status is the verdict's"
    )
    scoring: ScoringConfig = Field(default_factory=ScoringConfig, description="the verifier processes")
    sampling: TrainSamplingConfig = Field(default_factory=TrainSamplingConfig, description="training samples")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="the engines that sample")
    sync: SyncConfig = Field(default_factory=SyncConfig, description="verification of each weight sync")
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig, description="advantages, loss, reference")
    learner: LearnerConfig = Field(default_factory=LearnerConfig, description="optimizer")
    eval: EvalConfig = Field(description="held-out measurement")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="checkpoints")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="trackers beside metrics.jsonl")

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        names = [reward.name for reward in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"rewards need different names, not {names}")
        if self.learner.num_minibatches > self.num_prompts * self.group_size:
            raise ValueError(
                f"learner.num_minibatches={self.learner.num_minibatches} exceeds the step's "
                f"{self.num_prompts * self.group_size} samples (num_prompts * group_size)"
            )
        if self.algorithm.routing_replay and not self.engine.return_routed_experts:
            raise ValueError(
                "algorithm.routing_replay needs engine.return_routed_experts = true, to have what to replay"
            )
        if self.learner.max_tokens_per_microbatch < self.engine.max_model_len:
            raise ValueError(
                f"learner.max_tokens_per_microbatch={self.learner.max_tokens_per_microbatch} must hold the longest "
                f"sample, engine.max_model_len={self.engine.max_model_len} tokens"
            )
        if self.sampling.longest >= self.engine.max_model_len:
            raise ValueError(
                f"sampling.max_completion_tokens={self.sampling.longest} (the largest of the run) leaves no room for a "
                f"prompt in engine.max_model_len={self.engine.max_model_len}"
            )
        _check_sampling_mask(self)
        _check_ranks(self.learner)
        measured = self.eval.every_steps and self.checkpoint.every_steps % self.eval.every_steps == 0
        if self.checkpoint.keep_best and not measured:
            raise ValueError(
                f"checkpoint.keep_best needs a measurement at each checkpoint: set eval.every_steps to a divisor of "
                f"checkpoint.every_steps={self.checkpoint.every_steps}"
            )
        probe = self.sync.probe_prompt_tokens + self.sync.probe_tokens
        if probe > self.engine.max_model_len:
            raise ValueError(
                f"sync: a probe of {probe} tokens does not fit engine.max_model_len={self.engine.max_model_len}"
            )
        try:
            self.run_dir.format(name=self.name, seed=self.seed)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"run_dir={self.run_dir!r} may only contain {{name}} and {{seed}}") from error
        return self

    @property
    def run_path(self) -> Path:
        """The run's folder."""
        return Path(self.run_dir.format(name=self.name, seed=self.seed))
