"""Verified weight sync: after every update each engine samples a probe, whose log-probabilities the learner checks."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from policy.checkpoint import empty_policy, hf_state_dict, load_hf_state_dict
from policy.config import PolicyConfig
from policy.dense import DensePolicy
from policy.dense_config import DenseConfig
from policy.interface import Policy
from rollout.cluster import EnginePool
from rollout.engine import Completion, Engine, SamplingParams
from rollout.engine_checks import EngineError
from rollout.sync_diagnosis import Gap, Measure, SyncDiagnosis, measure_gap


class WeightSyncError(RuntimeError):
    """An engine does not hold the weights that were published, or did not take them in time."""


class SyncConfig(BaseModel):
    """How each sync of weights is verified."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_probes: int = Field(default=8, ge=1, description="random prompts that each engine continues after a sync")
    probe_prompt_tokens: int = Field(default=8, ge=5, description="length of these prompts, in tokens")
    probe_tokens: int = Field(default=8, ge=1, description="length of these continuations, in tokens")
    tolerance: float | None = Field(
        default=None,
        gt=0,
        description="largest mean gap, in nats; by default 1e-4 in float32 and 0.05 in half precision",
    )

    def tolerance_for(self, dtype: str) -> float:
        """The set tolerance, or the default for this type: measured noise is 3e-7 on average in fp32, 5e-3 in bf16."""
        if self.tolerance is not None:
            return self.tolerance
        return 1e-4 if dtype == "float32" else 0.05


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """One verified sync: seconds in all, and |engine's - learner's| log-probability over the probe, in nats."""

    version: int
    seconds: float
    probe_gap: float
    probe_gap_max: float


class WeightSource(Protocol):
    """What holds the weights that engines shall compute with: a policy in this process, or one spread over others."""

    def weights(self) -> dict[str, Tensor]:
        """The present weights under the released checkpoint's names; they may share memory with the source's own."""
        ...

    def measure_gap(self, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Gap:
        """How far an engine's log-probabilities of its completions at temperature 1 are from those of these weights."""
        ...

    def scratch(self) -> Policy:
        """A copy of the policy in this process, to try other weights in."""
        ...


class PolicySource:
    """A policy in this process."""

    def __init__(self, model: Policy) -> None:
        self.model = model

    def weights(self) -> dict[str, Tensor]:
        """The weights as views: they follow the policy."""
        return hf_state_dict(self.model)

    def measure_gap(self, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Gap:
        """As `measure_gap`, in evaluation mode: nothing of a probe is random, recomputed or counted."""
        was_training = self.model.training
        self.model.eval()
        try:
            return measure_gap(self.model, prompts, completions)
        finally:
            self.model.train(was_training)

    def scratch(self) -> Policy:
        """A copy on the policy's device."""
        return copy.deepcopy(self.model).eval()


def policy_of(config: PolicyConfig | DenseConfig, weights: Mapping[str, Tensor]) -> Policy:
    """A policy on the CPU that holds copies of `weights` (released names), which have to be all of them."""
    dtype = next(iter(weights.values())).dtype
    model = empty_policy(config, dtype) if isinstance(config, PolicyConfig) else DensePolicy(config, dtype)
    load_hf_state_dict(model, weights, "the given weights")
    return model.eval()


class WeightSync:
    """Publishes a learner's weights to an engine, or to all of a pool, and proves that they arrived."""

    def __init__(
        self, engine: Engine, *, vocab_size: int, engine_dtype: str = "float32", config: SyncConfig | None = None
    ) -> None:
        self.engine = engine
        self.config = config or SyncConfig()
        self.tolerance = self.config.tolerance_for(engine_dtype)
        self.vocab_size = vocab_size
        self._previous: dict[str, Tensor] | None = None

    def publish(self, source: WeightSource | Policy, version: int) -> SyncReport:
        """Give every engine the source's weights under `version`, then verify; raises WeightSyncError."""
        start = time.monotonic()
        source = _as_source(source)
        weights = source.weights()
        try:
            self.engine.load_weights(weights, version)
        except EngineError as error:
            raise WeightSyncError(f"version {version} of the weights did not reach every engine.\n{error}") from error
        return self._verify(source, weights, version, start)

    def verify(self, source: WeightSource | Policy, version: int) -> SyncReport:
        """Compare every engine's probe with the source, without sending weights; raises WeightSyncError."""
        start = time.monotonic()
        source = _as_source(source)
        return self._verify(source, source.weights(), version, start)

    def _verify(self, source: WeightSource, weights: Mapping[str, Tensor], version: int, start: float) -> SyncReport:
        engines = self.engine.engines if isinstance(self.engine, EnginePool) else [self.engine]
        gaps = [self._verified(engine, source, weights, version) for engine in engines]
        self._previous = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
        return SyncReport(
            version=version,
            seconds=time.monotonic() - start,
            probe_gap=max(gap.mean for gap in gaps),
            probe_gap_max=max(gap.largest for gap in gaps),
        )

    def _verified(self, engine: Engine, source: WeightSource, weights: Mapping[str, Tensor], version: int) -> Gap:
        """The gap of an engine that holds the source's weights; two probes must fail before it is said not to.

        Float noise can flip one routing decision and so move a few tokens of one probe; wrong weights move every probe.
        """
        gap = self._probe(engine, source.measure_gap, seed=2 * version)
        if gap.mean <= self.tolerance:
            return gap
        gap = self._probe(engine, source.measure_gap, seed=2 * version + 1)
        if gap.mean <= self.tolerance:
            return gap
        diagnosis = SyncDiagnosis(
            engine, source.scratch(), weights, version, gap, self.tolerance, previous=self._previous, probe=self._probe
        )
        try:
            suspect = diagnosis.in_words()
        except EngineError as error:
            suspect = f"No layer group can be named, since the engine failed meanwhile: {error}"
        raise WeightSyncError(
            f"{engine.name} does not compute with version {version} of the weights: its log-probabilities differ from "
            f"the learner's by {gap.mean:.2g} nats on average and {gap.largest:.2g} at most, over "
            f"{len(gap.completions)} probes (tolerance {self.tolerance:g} on average).\n{suspect}"
        )

    def _probe(self, engine: Engine, measure: Measure, seed: int) -> Gap:
        generator = torch.Generator().manual_seed(seed)
        shape = (self.config.num_probes, self.config.probe_prompt_tokens)
        prompts = torch.randint(self.vocab_size, shape, generator=generator).tolist()
        params = SamplingParams(max_completion_tokens=self.config.probe_tokens)
        try:
            completions = engine.generate(prompts, params, [seed * 1000 + row for row in range(len(prompts))])
        except EngineError as error:
            raise WeightSyncError(f"the probe after a weight sync got no answer.\n{error}") from error
        return measure(prompts, completions)


def _as_source(source: WeightSource | Policy) -> WeightSource:
    return PolicySource(source) if isinstance(source, Policy) else source
