"""The config of a GRPO run: values in TOML, every field described here, unknown keys and bad values refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from policy.layer_groups import LAYER_GROUPS
from rollout.cluster import EngineConfig
from rollout.tasks import DataConfig
from rollout.templates import check_template
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


class TrainSamplingConfig(_Table):
    """How training samples are drawn. There is no top_p: cutting off tokens would make the ratios wrong."""

    temperature: float = Field(
        default=1.0, gt=0, description="softmax temperature, of the engine and of the learner alike"
    )
    max_completion_tokens: int = Field(default=256, ge=1, description="longest completion, in tokens")


class AlgorithmConfig(_Table):
    """The loss; formulas and sources in docs/LOSSES.md."""

    advantage_std: Literal["group", "none"] = Field(
        default="group", description="divide advantages by the group's std, or not"
    )
    advantage_ddof: int = Field(default=1, ge=0, le=1, description="degrees of freedom taken off in that std")
    advantage_eps: float = Field(default=1e-6, ge=0, description="added to that std")
    ratio_level: Literal["token", "sequence"] = Field(
        default="token", description="importance ratio per token or sequence (GSPO)"
    )
    surrogate: Literal["clip", "cispo"] = Field(
        default="clip", description="PPO's clipped surrogate, or CISPO's clipped weight"
    )
    clip_low: float = Field(default=0.2, ge=0, lt=1, description="the ratio is clipped below 1 - clip_low")
    clip_high: float = Field(default=0.28, ge=0, description="the ratio is clipped above 1 + clip_high")
    dual_clip: float | None = Field(
        default=None, gt=1, description="bound on the loss of a negative advantage, times |A|"
    )
    cispo_ratio_max: float = Field(
        default=5.0, gt=0, description="largest importance weight of CISPO (a ratio, not a distance)"
    )
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = Field(
        default="token_mean", description="how token losses are summed over an optimizer step"
    )
    constant_length: int | None = Field(
        default=None, ge=1, description="the constant of aggregation 'constant', in tokens"
    )
    kl_coef: float = Field(
        default=0.001,
        ge=0,
        allow_inf_nan=False,
        description="weight of the KL to the reference; 0 loads no reference",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(default="k3", description="estimator of that KL per token")
    kl_importance_weighted: bool = Field(
        default=False, description="weight the KL by the ratio (DeepSeek-V3.2's unbiased estimate)"
    )
    routing_replay: bool = Field(
        default=False,
        description="route the learner's tokens to the experts that the engine chose (needs engine.return_routed_experts)",
    )
    reference_refresh_steps: int = Field(
        default=0, ge=0, description="the reference becomes the policy every so many steps; 0: never"
    )

    @model_validator(mode="after")
    def _complete(self) -> AlgorithmConfig:
        if self.aggregation == "constant" and self.constant_length is None:
            raise ValueError("aggregation 'constant' needs constant_length")
        return self


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
    num_minibatches: int = Field(default=1, ge=1, description="optimizer steps per rollout step")
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


class CheckpointConfig(_Table):
    """What is kept for resuming and for use."""

    every_steps: int = Field(default=20, ge=1, description="a checkpoint every so many steps, and one at the end")
    keep: int = Field(default=2, ge=1, description="how many of the newest are kept")


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
        if self.sampling.max_completion_tokens >= self.engine.max_model_len:
            raise ValueError(
                f"sampling.max_completion_tokens={self.sampling.max_completion_tokens} leaves no room for a prompt in "
                f"engine.max_model_len={self.engine.max_model_len}"
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
