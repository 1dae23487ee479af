"""The policy's config: what is refused, and the way to config.json and back."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.config import PolicyConfig, PolicyConfigError, TopkMethod, YarnScaling
from policy.layer_groups import LAYER_GROUPS, layer_group
from tests.policy.builders import TINY, tiny_policy

HF = TINY.to_hf_dict()
YARN_HF = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64}


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    q_lora=st.none() | st.integers(1, 64),
    group_size=st.integers(2, 6),
    n_group=st.integers(1, 4),
    tied=st.booleans(),
    theta=st.floats(1.0, 1e7),
    eos=st.none() | st.integers(0, 60),
    method=st.sampled_from(["noaux_tc", "group_limited_greedy"]),
    yarn=st.none()
    | st.builds(YarnScaling, factor=st.floats(1, 80), original_max_position_embeddings=st.integers(1, 9999)),
    ahead=st.integers(0, 3),
)
def test_the_way_to_config_json_and_back(
    q_lora: int | None,
    group_size: int,
    n_group: int,
    tied: bool,
    theta: float,
    eos: int | None,
    method: TopkMethod,
    yarn: YarnScaling | None,
    ahead: int,
) -> None:
    config = replace(
        TINY,
        q_lora_rank=q_lora,
        n_routed_experts=group_size * n_group,
        n_group=n_group,
        topk_group=n_group,
        num_experts_per_tok=2,
        tie_word_embeddings=tied,
        rope_theta=theta,
        eos_token_id=eos,
        topk_method=method,
        rope_scaling=yarn,
        num_nextn_predict_layers=ahead,
    )
    assert PolicyConfig.from_hf_dict(config.to_hf_dict("bfloat16")) == config
    assert config.to_hf_dict("bfloat16")["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1, not 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"n_group": 0}, "n_group must be at least 1"),
        ({"topk_group": 0}, "topk_group must be at least 1"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be at least 1"),
        ({"n_routed_experts": 0}, "n_routed_experts must be at least 1"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be at least 1"),
        ({"v_head_dim": -1}, "v_head_dim must be at least 1"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even, not 7"),
        ({"n_group": 3}, "n_group=3 does not divide n_routed_experts=8"),
        ({"n_group": 2, "topk_group": 3}, "topk_group=3 exceeds n_group=2"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 exceeds the experts of topk_group=1"),
        ({"n_group": 4, "num_experts_per_tok": 3}, "num_experts_per_tok=3 exceeds the experts of topk_group=1"),
        ({"n_group": 8, "num_experts_per_tok": 1}, "a routing group needs at least 2 experts"),
        ({"q_lora_rank": 0}, "q_lora_rank"),
        ({"topk_method": "greedy", "n_group": 2}, "knows no groups"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyConfigError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2'; this policy is deepseek_v2 or deepseek_v3"),
        ({"model_type": None}, "model_type=None"),
        ({"rope_scaling": {"type": "yarn", "factor": 40}}, "rope_scaling lacks original_max_position_embeddings"),
        ({"rope_scaling": YARN_HF | {"truncate": False}}, "rope_scaling has truncate"),
        ({"rope_scaling": YARN_HF | {"factor": "40"}}, "rope_scaling has values that are no numbers: factor='40'"),
        ({"rope_scaling": YARN_HF | {"beta_fast": 1}}, "beta_fast > beta_slow"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e4}}, "rope type 'linear'"),
        ({"rope_interleave": False}, "rope_interleave=false"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"topk_method": "best"}, "topk_method='best'"),
        ({"topk_method": "greedy"}, "combines model_type='deepseek_v3', topk_method='greedy'"),
        ({"model_type": "deepseek_v2"}, "combines model_type='deepseek_v2', topk_method='noaux_tc'"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers must be at least 0"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ],
)
def test_what_the_policy_cannot_compute_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyConfigError, match=message):
        PolicyConfig.from_hf_dict(HF | changes)


@pytest.mark.parametrize("name", ["hidden_size", "n_routed_experts", "n_group", "routed_scaling_factor", "q_lora_rank"])
def test_a_missing_field_is_named_and_not_guessed(name: str) -> None:
    with pytest.raises(PolicyConfigError, match=rf"config\.json lacks {name}"):
        PolicyConfig.from_hf_dict({key: value for key, value in HF.items() if key != name})


@pytest.mark.parametrize(("name", "value"), [("hidden_size", "48"), ("n_group", None), ("rms_norm_eps", "small")])
def test_a_value_of_another_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(PolicyConfigError, match=f"{name}={value!r}"):
        PolicyConfig.from_hf_dict(HF | {name: value})


def test_rope_theta_is_found_in_either_place() -> None:
    without = {key: value for key, value in HF.items() if key != "rope_theta"}
    new = without | {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}
    assert PolicyConfig.from_hf_dict(new).rope_theta == 123.0
    assert PolicyConfig.from_hf_dict(without | {"rope_theta": 77.0}).rope_theta == 77.0
    with pytest.raises(PolicyConfigError, match=r"config\.json lacks rope_theta"):
        PolicyConfig.from_hf_dict(without)


def test_of_several_end_tokens_the_first_is_taken() -> None:
    assert PolicyConfig.from_hf_dict(HF | {"eos_token_id": [5, 6]}).eos_token_id == 5


def test_transformers_reads_the_same_config() -> None:
    transformers = pytest.importorskip("transformers")
    config = replace(TINY, q_lora_rank=20, n_group=4, topk_group=2, rope_theta=500.0, eos_token_id=3, pad_token_id=1)
    theirs = transformers.DeepseekV3Config(**config.to_hf_dict())
    for field in fields(PolicyConfig):
        if field.name not in ("rope_theta", "rope_scaling", "num_nextn_predict_layers", "precision"):
            assert getattr(theirs, field.name) == getattr(config, field.name), field.name
    assert theirs.rope_parameters["rope_theta"] == 500.0
    assert theirs.rope_parameters["rope_type"] == "default"
    assert theirs.num_mtp_layers == 0
    assert PolicyConfig.from_hf_dict(theirs.to_dict()) == config


def test_transformers_reads_the_same_scaled_rope() -> None:
    transformers = pytest.importorskip("transformers")
    yarn = YarnScaling(factor=8.0, original_max_position_embeddings=16, mscale=0.707, mscale_all_dim=0.5)
    config = replace(TINY, rope_scaling=yarn, rope_theta=500.0, num_nextn_predict_layers=2)
    theirs = transformers.DeepseekV3Config(**config.to_hf_dict())
    assert theirs.rope_parameters["rope_type"] == "yarn"
    assert theirs.num_mtp_layers == 2
    assert PolicyConfig.from_hf_dict(theirs.to_dict()) == config


def test_a_scaled_rope_may_be_given_as_a_table() -> None:
    table = {"factor": 4.0, "original_max_position_embeddings": 32}
    config = PolicyConfig(**{**asdict(TINY), "rope_scaling": table})
    assert config.rope_scaling == YarnScaling(factor=4.0, original_max_position_embeddings=32)
    assert config.attention_scale == TINY.attention_scale  # mscale_all_dim is 0
    warmer = replace(config, rope_scaling=YarnScaling(**table, mscale_all_dim=1.0))
    assert warmer.attention_scale == pytest.approx(TINY.attention_scale * (0.1 * math.log(4) + 1) ** 2)


def test_sizes_that_follow_from_others() -> None:
    assert TINY.qk_head_dim == 24
    assert TINY.latent_dim == 32


def test_every_weight_belongs_to_a_layer_group() -> None:
    model = tiny_policy(replace(TINY, q_lora_rank=20, num_nextn_predict_layers=1))
    groups = {name: layer_group(name) for name in model.state_dict()}
    assert set(groups.values()) == set(LAYER_GROUPS)
    assert groups["model.layers.0.self_attn.q_a_layernorm.weight"] == "norms"
    assert groups["model.layers.0.mlp.gate_proj.weight"] == "dense_mlp"
    assert groups["model.layers.1.mlp.gate.weight"] == "router"
    assert groups["model.layers.1.mlp.shared_experts.gate_proj.weight"] == "shared_experts"
    assert layer_group("model.layers.1.mlp.experts.3.gate_proj.weight") == "experts"
    with pytest.raises(ValueError, match=r"visual\.patch is not a parameter of the policy"):
        layer_group("visual.patch")
