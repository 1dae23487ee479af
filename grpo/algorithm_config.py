"""The choices that make up the algorithm: advantage, ratio, surrogate, KL, entropy, mismatch; formulas in docs/LOSSES.md."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class MismatchConfig(BaseModel):
    """What to do where the engine's probabilities are not the learner's: w = pi_old / pi_rollout, of the same weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    truncate: Literal["none", "token", "sequence"] = Field(
        default="none", description="multiply the surrogate by min(w, truncate_max), w per token or per sequence"
    )
    truncate_max: float = Field(default=2.0, gt=0, description="upper bound of that factor")
    mask: Literal["none", "token", "sequence"] = Field(
        default="none", description="leave out tokens, or whole sequences, whose w lies outside of mask_min to mask_max"
    )
    mask_min: float = Field(default=0.5, ge=0, description="smallest w that is kept")
    mask_max: float = Field(default=2.0, gt=0, description="largest w that is kept")
    sequence_ratio: Literal["product", "geometric_mean"] = Field(
        default="product", description="w of a sequence: product over its tokens, or their geometric mean"
    )
    off_policy_threshold: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="leave out sequences with A < 0 whose mean log(pi_rollout / pi) exceeds this (DeepSeek-V3.2), in nats",
    )

    @model_validator(mode="after")
    def _ordered(self) -> MismatchConfig:
        if self.mask_min > self.mask_max:
            raise ValueError(f"mask_min={self.mask_min:g} exceeds mask_max={self.mask_max:g}")
        return self


class AlgorithmConfig(BaseModel):
    """The loss and what goes into it; formulas and sources in docs/LOSSES.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    advantage_baseline: Literal["group_mean", "leave_one_out"] = Field(
        default="group_mean",
        description="what a reward is compared with: its group's mean, or that of the others (RLOO)",
    )
    advantage_std: Literal["group", "batch", "none"] = Field(
        default="group", description="divide advantages by the std of the group, of the whole step, or not"
    )
    advantage_ddof: int = Field(default=1, ge=0, le=1, description="degrees of freedom taken off in that std")
    advantage_eps: float = Field(default=1e-6, ge=0, description="added to that std")
    advantage_per_reward: bool = Field(
        default=False, description="normalise each reward on its own within the group, then sum by weight (GDPO)"
    )
    zero_variance_groups: Literal["keep", "drop", "resample"] = Field(
        default="keep",
        description="groups of equal rewards: keep them (they count in the normalisation), drop them, or sample others",
    )
    max_draws_per_step: int = Field(
        default=4, ge=1, description="with 'resample': most draws of num_prompts prompts for one step"
    )
    ratio_level: Literal["token", "sequence", "none"] = Field(
        default="token", description="importance ratio per token, per sequence (GSPO), or none (REINFORCE)"
    )
    surrogate: Literal["clip", "cispo", "sapo"] = Field(
        default="clip", description="PPO's clipped surrogate, CISPO's clipped weight, or SAPO's soft gate"
    )
    clip_low: float = Field(default=0.2, ge=0, description="the ratio is clipped below 1 - clip_low")
    clip_high: float = Field(default=0.28, ge=0, description="the ratio is clipped above 1 + clip_high")
    dual_clip: float | None = Field(
        default=None, gt=1, description="bound on the loss of a negative advantage, times |A|"
    )
    ratio_cap: float | None = Field(
        default=None, gt=0, description="the unclipped ratio is held at or below this (INTELLECT-2's delta)"
    )
    cispo_ratio_max: float | None = Field(
        default=None, gt=0, description="CISPO: largest importance weight, as a ratio (ScaleRL: 5)"
    )
    cispo_eps_high: float | None = Field(
        default=None, gt=0, description="CISPO: the same as a distance, the weight is at most 1 + this (MiniMax-M1)"
    )
    cispo_ratio_min: float = Field(default=0.0, ge=0, description="CISPO: smallest importance weight, as a ratio")
    sapo_temperature_positive: float = Field(default=1.0, gt=0, description="SAPO: sharpness of the gate where A > 0")
    sapo_temperature_negative: float = Field(default=1.05, gt=0, description="SAPO: the same where A <= 0")
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = Field(
        default="token_mean", description="how token losses are summed over an optimizer step"
    )
    constant_length: int | None = Field(
        default=None, ge=1, description="the constant of aggregation 'constant', in tokens"
    )
    mask_truncated: bool = Field(
        default=False, description="leave completions that were cut off at the length limit out of the loss (DAPO)"
    )
    kl_coef: float = Field(
        default=0.001,
        ge=0,
        allow_inf_nan=False,
        description="weight of the KL to the reference; 0 loads no reference",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(default="k3", description="estimator of that KL per token")
    kl_placement: Literal["loss", "reward"] = Field(
        default="loss", description="add the KL to the loss, or take its sum over the completion off the reward"
    )
    kl_importance_weighted: bool = Field(
        default=False, description="weight the KL by the ratio (DeepSeek-V3.2's unbiased estimate)"
    )
    kl_bound: float | None = Field(default=None, gt=0, description="the estimate of a token is clamped to +- this")
    reference_refresh_steps: int = Field(
        default=0, ge=0, description="the reference becomes the policy every so many steps; 0: never"
    )
    reference_ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="after every step the reference becomes decay * itself + (1 - decay) * policy",
    )
    entropy_coef: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of the entropy bonus; where adaptive, its first value",
    )
    entropy_target: float | None = Field(
        default=None,
        gt=0,
        description="entropy, in nats per token, below which the bonus grows and above which it fades",
    )
    entropy_coef_step: float = Field(default=1e-4, gt=0, description="how much the adaptive bonus changes per step")
    entropy_coef_max: float = Field(default=0.01, gt=0, description="largest adaptive bonus")
    mismatch: MismatchConfig = Field(
        default_factory=MismatchConfig, description="correction for the engine's probabilities not being the learner's"
    )
    routing_replay: bool = Field(
        default=False,
        description="route the learner's tokens to the experts that the engine chose (needs engine.return_routed_experts)",
    )
    sampling_mask_replay: bool = Field(
        default=False,
        description="mask what sampling.top_p and top_k cut off out of the learner's distribution too (DeepSeek-V3.2)",
    )

    @model_validator(mode="after")
    def _complete(self) -> AlgorithmConfig:
        if self.aggregation == "constant" and self.constant_length is None:
            raise ValueError("aggregation 'constant' needs constant_length")
        if self.surrogate == "cispo" and (self.cispo_ratio_max is None) == (self.cispo_eps_high is None):
            raise ValueError("surrogate 'cispo' needs exactly one of cispo_ratio_max (a ratio) and cispo_eps_high")
        if self.kl_placement == "reward" and self.kl_coef > 0 and self.zero_variance_groups != "keep":
            raise ValueError("with kl_placement 'reward' no group has equal rewards: set zero_variance_groups = 'keep'")
        if self.kl_placement == "reward" and self.kl_importance_weighted:
            raise ValueError("kl_importance_weighted weights the loss's KL; with kl_placement 'reward' there is none")
        if self.kl_placement == "reward" and self.advantage_per_reward:
            raise ValueError(
                "kl_placement 'reward' takes the KL off the sum of the rewards, which advantage_per_reward does not look at: "
                "set kl_placement = 'loss', or advantage_per_reward = false"
            )
        if self.reference_refresh_steps and self.reference_ema_decay is not None:
            raise ValueError("set reference_refresh_steps or reference_ema_decay, not both")
        if self.entropy_target is not None and self.entropy_coef > self.entropy_coef_max:
            raise ValueError(f"entropy_coef={self.entropy_coef:g} exceeds entropy_coef_max={self.entropy_coef_max:g}")
        return self
