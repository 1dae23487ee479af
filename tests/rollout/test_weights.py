"""Verified weight sync, with engines that lose, ignore, garble or never take an update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch

from policy.checkpoint import hf_state_dict
from policy.deepseek import DeepseekPolicy
from policy.layer_groups import LAYER_GROUPS, layer_group
from rollout.cluster import EnginePool
from rollout.engine import Completion, SamplingParams
from rollout.engine_checks import EngineError
from rollout.sync_diagnosis import Gap, measure_gap
from rollout.torch_engine import TorchEngine
from rollout.weights import PolicySource, SyncConfig, WeightSync, WeightSyncError, policy_of
from tests.policy.dense_builders import dense_policy

MakePolicy = Callable[[int], DeepseekPolicy]
SAMPLED = [group for group in LAYER_GROUPS if group != "mtp"]  # drafts change no sample, so no probe sees them
VOCAB = 96


class LosingEngine(TorchEngine):
    """Keeps its own weights of the groups named in `lost`."""

    lost: Sequence[str] = ()

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        own = {name: weight.clone() for name, weight in hf_state_dict(self.model).items()}
        mixed = {name: own[name] if layer_group(name) in self.lost else weight for name, weight in weights.items()}
        super().load_weights(mixed, version)


def moved(model: DeepseekPolicy, size: float) -> DeepseekPolicy:
    """A copy with every weight moved by a random step of this relative size."""
    generator = torch.Generator().manual_seed(9)
    copy = DeepseekPolicy(model.config)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            step = torch.randn(weight.shape, generator=generator) * weight.float().std().clamp(min=0.05)
            copy.state_dict()[name].copy_(weight + size * step)
    return copy.eval()


def synced(engine: TorchEngine, first: DeepseekPolicy) -> WeightSync:
    sync = WeightSync(engine, vocab_size=VOCAB)
    sync.publish(first, 0)
    return sync


def test_a_good_sync_reports_its_gap_and_version(make_policy: MakePolicy) -> None:
    engine = TorchEngine(make_policy(0))
    sync = WeightSync(engine, vocab_size=VOCAB)
    assert sync.verify(make_policy(0), 0).probe_gap < 1e-5
    report = sync.publish(make_policy(1), 4)
    assert (report.version, engine.policy_version) == (4, 4)
    assert 0 <= report.probe_gap <= report.probe_gap_max < 1e-5
    assert report.seconds > 0


@pytest.mark.parametrize("group", SAMPLED)
def test_a_group_that_stays_behind_is_named(make_policy: MakePolicy, group: str) -> None:
    engine = LosingEngine(make_policy(0))
    sync = synced(engine, make_policy(0))
    engine.lost = [group]
    with pytest.raises(WeightSyncError, match=rf"engine-0 .* version 7 .*\n.*previous `{group}` weights") as caught:
        sync.publish(make_policy(1), 7)
    assert "tolerance 0.0001" in str(caught.value)


@pytest.mark.parametrize("group", [group for group in SAMPLED if group != "router_bias"])
def test_a_group_that_stays_behind_is_named_after_a_small_step(make_policy: MakePolicy, group: str) -> None:
    first = make_policy(0)
    engine = LosingEngine(first)
    sync = synced(engine, first)
    engine.lost = [group]
    with pytest.raises(WeightSyncError, match=f"previous `{group}` weights"):
        sync.publish(moved(first, 0.01), 1)


def test_an_update_without_effect_is_told_from_a_lost_group(make_policy: MakePolicy) -> None:
    engine = LosingEngine(make_policy(0))
    sync = synced(engine, make_policy(0))
    engine.lost = LAYER_GROUPS
    with pytest.raises(WeightSyncError, match="still has the previous weights entirely"):
        sync.publish(make_policy(1), 1)


class GarblingEngine(TorchEngine):
    """Loads the numbers of one group's weights in the wrong order."""

    garbled = ""

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        mixed = {
            k: w.flatten().flip(0).reshape(w.shape) if layer_group(k) == self.garbled else w for k, w in weights.items()
        }
        super().load_weights(mixed, version)


@pytest.mark.parametrize("published_before", [True, False])
@pytest.mark.parametrize("group", SAMPLED)
def test_a_group_that_is_garbled_is_named(make_policy: MakePolicy, group: str, published_before: bool) -> None:
    engine = GarblingEngine(make_policy(0))
    sync = WeightSync(engine, vocab_size=VOCAB)
    if published_before:
        sync.publish(make_policy(0), 0)
    engine.garbled = group
    expected = "Suspect `embedding` or `head`" if group in ("embedding", "head") else f"engine-0 is wrong in `{group}`"
    with pytest.raises(WeightSyncError, match=expected):
        sync.publish(make_policy(1), 1)


def test_an_engine_of_another_model_is_blamed_on_no_single_group(make_policy: MakePolicy) -> None:
    sync = synced(TorchEngine(make_policy(0)), make_policy(0))
    sync.engine = TorchEngine(make_policy(5))
    sync.engine.load_weights = lambda weights, version: None  # type: ignore[method-assign]
    with pytest.raises(WeightSyncError, match="No single group explains it"):
        sync.publish(make_policy(1), 1)


def test_nan_in_the_engine_is_a_gap(make_policy: MakePolicy) -> None:
    engine = TorchEngine(make_policy(0))
    sample = engine.generate

    def broken(prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]) -> list[Completion]:
        return [
            Completion(
                token_ids=c.token_ids,
                logprobs=[float("nan")] * len(c.logprobs),
                finish_reason=c.finish_reason,
                policy_version=c.policy_version,
            )
            for c in sample(prompts, params, seeds)
        ]

    engine.generate = broken  # type: ignore[method-assign]
    with pytest.raises(WeightSyncError, match="by inf nats on average"):
        WeightSync(engine, vocab_size=VOCAB).publish(make_policy(1), 1)


def test_one_probe_that_is_off_is_asked_again(make_policy: MakePolicy) -> None:
    engine, other = TorchEngine(make_policy(0)), TorchEngine(make_policy(1))
    answers = [other.generate, engine.generate]  # the second is right
    engine.generate = lambda *request: answers.pop(0)(*request)  # type: ignore[method-assign]
    report = WeightSync(engine, vocab_size=VOCAB).publish(make_policy(0), 1)
    assert report.probe_gap < 1e-5
    assert answers == []


def test_the_engine_of_a_pool_that_is_wrong_is_named(make_policy: MakePolicy) -> None:
    engines = [LosingEngine(make_policy(0), name=f"engine-{i}") for i in range(3)]
    pool = EnginePool(engines)
    sync = WeightSync(pool, vocab_size=VOCAB)
    sync.publish(make_policy(0), 0)
    engines[1].lost = ["experts"]
    with pytest.raises(WeightSyncError, match="engine-1 still seems to hold the previous `experts`"):
        sync.publish(make_policy(1), 1)
    pool.close()


def test_an_update_that_fails_says_why(make_policy: MakePolicy) -> None:
    engine = TorchEngine(make_policy(0))

    def hang(weights: Mapping[str, torch.Tensor], version: int) -> None:
        raise EngineError("engine-0 failed while loading the weights of version 3: no answer within 60 s")

    engine.load_weights = hang  # type: ignore[method-assign]
    with pytest.raises(WeightSyncError, match=r"version 3 .*did not reach every engine.\n.*no answer within 60 s"):
        WeightSync(engine, vocab_size=VOCAB).publish(make_policy(1), 3)


def test_the_probe_leaves_the_learner_as_it_was(make_policy: MakePolicy) -> None:
    model = make_policy(0).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    WeightSync(TorchEngine(model), vocab_size=VOCAB).publish(model, 1)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loads = [buffer for name, buffer in model.named_buffers() if name.endswith(".load")]
    assert len(loads) == 2
    assert all(not load.any() for load in loads)


def test_the_tolerance_follows_the_engines_type_unless_set(make_policy: MakePolicy) -> None:
    assert SyncConfig().tolerance_for("float32") == 1e-4
    assert SyncConfig().tolerance_for("bfloat16") == 0.05
    assert SyncConfig(tolerance=0.2).tolerance_for("float32") == 0.2
    model = make_policy(0)
    engine = TorchEngine(model, dtype="bfloat16")
    report = WeightSync(engine, vocab_size=VOCAB, engine_dtype="bfloat16").publish(model, 1)
    assert 1e-4 < report.probe_gap < 0.05
    strict = WeightSync(engine, vocab_size=VOCAB, engine_dtype="bfloat16", config=SyncConfig(tolerance=1e-4))
    with pytest.raises(WeightSyncError, match=r"tolerance 0.0001"):
        strict.publish(model, 2)


class Elsewhere:
    """A source whose policy is not at hand: only weights, gaps and copies come out of it."""

    def __init__(self, model: DeepseekPolicy) -> None:
        self._model = model
        self.asked = 0

    def weights(self) -> dict[str, torch.Tensor]:
        self.asked += 1
        return {name: weight.detach().clone() for name, weight in hf_state_dict(self._model).items()}

    def measure_gap(self, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Gap:
        return measure_gap(self._model, prompts, completions)

    def scratch(self) -> DeepseekPolicy:
        model = policy_of(self._model.config, hf_state_dict(self._model))
        assert isinstance(model, DeepseekPolicy)
        return model


@pytest.mark.parametrize("group", ["attention", "experts"])
def test_a_source_elsewhere_is_asked_once_and_explains_as_well(make_policy: MakePolicy, group: str) -> None:
    engine = LosingEngine(make_policy(0))
    sync = WeightSync(engine, vocab_size=VOCAB)
    source = Elsewhere(make_policy(0))
    assert sync.publish(source, 0).probe_gap_max < 1e-5
    assert source.asked == 1
    engine.lost = [group]
    with pytest.raises(WeightSyncError, match=f"previous `{group}` weights"):
        sync.publish(Elsewhere(make_policy(1)), 1)


def test_a_policy_made_of_weights_is_the_same_and_its_own(make_policy: MakePolicy) -> None:
    model = make_policy(3)
    copy = policy_of(model.config, hf_state_dict(model))
    assert not copy.training
    assert copy.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in copy.state_dict().items())
    with torch.no_grad():
        for value in copy.state_dict().values():
            value.add_(1)
    assert all(torch.equal(v, make_policy(3).state_dict()[name]) for name, v in model.state_dict().items())


def test_a_policy_made_of_dense_weights_is_the_same() -> None:
    model = dense_policy("qwen3_tied")
    copy = policy_of(model.config, hf_state_dict(model))
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    completions = TorchEngine(model).generate(prompts, SamplingParams(max_completion_tokens=8), [0, 1])
    assert measure_gap(copy, prompts, completions).largest < 1e-5


def test_a_source_measures_in_evaluation_mode_and_follows_its_policy(make_policy: MakePolicy) -> None:
    model = make_policy(0).train()
    source = PolicySource(model)
    prompts = [[1, 2, 3], [4, 5]]
    completions = TorchEngine(model).generate(prompts, SamplingParams(max_completion_tokens=8), [0, 1])
    modes: list[bool] = []
    handle = model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    assert source.measure_gap(prompts, completions).largest < 1e-5
    handle.remove()
    assert modes == [False]
    assert model.training
    weights, scratch = source.weights(), source.scratch()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not weights["lm_head.weight"].any()
    assert scratch.lm_head.weight.any()
    assert not scratch.training
