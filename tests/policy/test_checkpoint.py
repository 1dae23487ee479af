"""Checkpoints of policies: round trips in every type, names of the release, multi-token prediction, transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from policy.checkpoint import (
    CheckpointError,
    empty_policy,
    hf_state_dict,
    load_hf_state_dict,
    load_policy,
    read_config,
    save_policy,
)
from policy.config import PolicyConfig, YarnScaling
from policy.deepseek import DeepseekPolicy
from policy.dense import DensePolicy
from policy.dense_config import DenseConfig
from policy.fp8_format import dequantise, is_quantised, quantise
from tests.policy.builders import TINY, packed_logits, random_sequences, tiny_policy

V2 = replace(TINY, topk_method="greedy", norm_topk_prob=False, n_shared_experts=2)
MTP = replace(TINY, num_nextn_predict_layers=2, q_lora_rank=20)
CONFIGS = {
    "plain": TINY,
    "q_lora_groups": replace(TINY, q_lora_rank=20, n_group=4, topk_group=2, eos_token_id=0, pad_token_id=1),
    "tied": replace(TINY, tie_word_embeddings=True),
    "yarn": replace(TINY, rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=16)),
    "v2": replace(V2, topk_method="group_limited_greedy", n_group=4, topk_group=2, q_lora_rank=20),
    "v2_lite": V2,
    "mtp": MTP,
    "mtp_tied": replace(MTP, tie_word_embeddings=True),
    # Widths that 128 divides, and others that it doesn't.
    "wide": replace(MTP, hidden_size=136, moe_intermediate_size=128, kv_lora_rank=130, n_routed_experts=4),
}
ROUTER_BIAS = "e_score_correction_bias"
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The checkpoint of `tiny_policy()`."""
    return checkpoint_of(tiny_policy(), tmp_path / "checkpoint")


def checkpoint_of(model: DeepseekPolicy, folder: Path, **options: Any) -> Path:
    folder.mkdir()
    save_policy(model, folder, **options)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> DeepseekPolicy:
    model = load_policy(folder, dtype, **options)
    assert isinstance(model, DeepseekPolicy)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def stored_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, as the safetensors library reads them."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same_weights(one: DeepseekPolicy, other: DeepseekPolicy) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@every_config
@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
def test_a_round_trip_is_bit_exact(config: PolicyConfig, max_shard_bytes: int, tmp_path: Path) -> None:
    model = tiny_policy(config)
    save_policy(model, tmp_path, max_shard_bytes=max_shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_bytes < 2**30)
    loaded = load(tmp_path)
    assert loaded.config == config
    assert_same_weights(model, loaded)
    assert dict(loaded.named_buffers()).keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(b, model.get_buffer(n)) for n, b in loaded.named_buffers())
    sequences = random_sequences([8, 3])
    assert torch.equal(packed_logits(model, sequences), packed_logits(loaded, sequences))


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_in_bfloat16_is_the_rounded_policy(
    config: PolicyConfig, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_policy(config)
    save_policy(model, tmp_path, dtype="bfloat16")
    loaded = load(tmp_path, dtype)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    for name, value in stored_in(tmp_path).items():
        assert value.dtype == (torch.float32 if name.endswith(ROUTER_BIAS) else torch.bfloat16), name
    for name, value in loaded.named_parameters():
        assert torch.equal(value, model.get_parameter(name).bfloat16().to(dtype)), name
    for name, value in loaded.named_buffers():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.get_buffer(name)), name


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_in_fp8_is_the_released_format(config: PolicyConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_policy(config)
    save_policy(model, tmp_path, dtype="float8_e4m3fn", max_shard_bytes=30_000)
    stored, loaded = stored_in(tmp_path), hf_state_dict(load(tmp_path, dtype))
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["quantization_config"]["weight_block_size"] == [128, 128]
    assert values["dtype"] == "bfloat16"
    for name, weight in hf_state_dict(model).items():
        if is_quantised(name, tuple(weight.shape)):
            quantised, scale = quantise(weight)
            assert torch.equal(stored[name].view(torch.uint8), quantised.view(torch.uint8)), name
            assert torch.equal(stored.pop(name + "_scale_inv"), scale), name
            expected = dequantise(quantised, scale)
        else:
            expected = weight if name.endswith(ROUTER_BIAS) else weight.bfloat16()
            assert torch.equal(stored[name], expected), name
        assert torch.equal(loaded[name], expected.to(loaded[name].dtype)), name
        assert (expected - weight).abs().max() <= weight.abs().max() * 2**-4
    assert stored.keys() >= loaded.keys()
    assert not any(name.endswith("_scale_inv") for name in stored)  # each belonged to a weight


def test_fp8_loaded_and_saved_again_is_the_same_file(tmp_path: Path) -> None:
    first = checkpoint_of(tiny_policy(CONFIGS["wide"]), tmp_path / "first", dtype="float8_e4m3fn")
    second = checkpoint_of(load(first), tmp_path / "second", dtype="float8_e4m3fn")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_a_weight_that_fp8_cannot_hold_is_named(tmp_path: Path) -> None:
    model = tiny_policy()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.experts.down_proj")[3, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.3\.down_proj\.weight holds NaN"):
        save_policy(model, tmp_path, dtype="float8_e4m3fn")
    save_policy(model, tmp_path)
    assert load(tmp_path).get_parameter("model.layers.1.mlp.experts.down_proj").isnan().sum() == 1


def test_the_file_has_the_released_names_one_entry_per_expert(saved: Path) -> None:
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == hf_state_dict(tiny_policy()).keys()
    stem = "model.layers.1.mlp"
    for expert in range(TINY.n_routed_experts):
        assert {f"{stem}.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")} <= names
    assert f"{stem}.gate.e_score_correction_bias" in names
    assert "model.layers.0.self_attn.kv_a_proj_with_mqa.weight" in names
    assert not any("gate_up_proj" in name or name.endswith("load") for name in names)


def test_experts_are_views_of_the_stacked_weights() -> None:
    model = tiny_policy()
    named = hf_state_dict(model)
    stacked = model.get_parameter("model.layers.2.mlp.experts.gate_up_proj")
    width = TINY.moe_intermediate_size
    assert torch.equal(named["model.layers.2.mlp.experts.5.gate_proj.weight"], stacked[5, :width])
    assert torch.equal(named["model.layers.2.mlp.experts.5.up_proj.weight"], stacked[5, width:])
    with torch.no_grad():
        stacked.zero_()
    assert named["model.layers.2.mlp.experts.5.up_proj.weight"].abs().max() == 0


def test_the_config_says_what_vllm_needs(saved: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    assert values["topk_method"] == "noaux_tc"
    assert values["scoring_func"] == "sigmoid"
    assert values["model_type"] == "deepseek_v3"
    assert values["architectures"] == ["DeepseekV3ForCausalLM"]
    assert values["dtype"] == "float32"


def test_a_checkpoint_that_transformers_wrote_loads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = replace(TINY, q_lora_rank=20, rope_theta=500.0, eos_token_id=3, routed_scaling_factor=1.5)
    reference = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**config.to_hf_dict())).eval()
    reference.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.config == config
    (sequence,) = random_sequences([12])
    with torch.no_grad():
        gap = packed_logits(model, [sequence]) - reference(torch.tensor([sequence])).logits[0]
    assert gap.abs().max() < 1e-5


def test_weights_that_do_not_fit_change_nothing() -> None:
    model, fresh = tiny_policy(), tiny_policy()
    weights = {name: value + 1 for name, value in hf_state_dict(model).items()}
    del weights["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"the update does not fit.*missing lm_head\.weight"):
        load_hf_state_dict(model, weights, "the update")
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())


def test_what_is_saved_is_a_copy_of_the_model(saved: Path) -> None:
    model = load(saved)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(load(saved).lm_head.weight, tiny_policy().lm_head.weight)


def test_the_release_repeats_embedding_and_head_in_each_prediction_layer(tmp_path: Path) -> None:
    model = tiny_policy(MTP)
    stored = stored_in(checkpoint_of(model, tmp_path / "checkpoint"))
    assert stored.keys() - hf_state_dict(model).keys() == {
        f"model.layers.{layer}.{part}.weight" for layer in (3, 4) for part in ("embed_tokens", "shared_head.head")
    }
    assert {f"model.layers.3.{p}.weight" for p in ("enorm", "hnorm", "eh_proj", "shared_head.norm")} <= stored.keys()
    assert torch.equal(stored["model.layers.4.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert torch.equal(stored["model.layers.4.shared_head.head.weight"], model.lm_head.weight)


def rewrite(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "model.safetensors")


def test_repeated_weights_may_be_absent_but_not_others(tmp_path: Path) -> None:
    model = tiny_policy(MTP)
    folder = checkpoint_of(model, tmp_path / "checkpoint")
    weights = stored_in(folder)
    del weights["model.layers.3.embed_tokens.weight"]
    rewrite(folder, weights)
    assert_same_weights(load(folder), model)
    weights["model.layers.4.shared_head.head.weight"][5, 5] += 1
    rewrite(folder, weights)
    with pytest.raises(CheckpointError, match=r"layers\.4\.shared_head\.head\.weight differs from .*drop_mtp"):
        load(folder)
    with pytest.raises(CheckpointError, match=r"layers\.4\.shared_head\.head\.weight differs"):
        load_hf_state_dict(tiny_policy(MTP), weights, "the update")


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path: Path) -> None:
    model = tiny_policy(CONFIGS["tied"])
    folder = checkpoint_of(model, tmp_path / "checkpoint")
    weights = stored_in(folder)
    assert "lm_head.weight" not in weights
    rewrite(folder, weights | {"lm_head.weight": model.lm_head.weight.detach().clone()})
    assert_same_weights(load(folder), model)
    rewrite(folder, weights | {"lm_head.weight": model.lm_head.weight.detach() + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the weight it should share"):
        load(folder)


def test_prediction_layers_are_dropped_only_on_demand(tmp_path: Path) -> None:
    model = tiny_policy(MTP)
    folder = checkpoint_of(model, tmp_path / "checkpoint", max_shard_bytes=30_000)
    dropped = load(folder, drop_mtp=True)
    assert dropped.config == replace(MTP, num_nextn_predict_layers=0)
    main, whole = hf_state_dict(dropped), hf_state_dict(model)
    assert main.keys() == {name for name in whole if not name.startswith(("model.layers.3.", "model.layers.4."))}
    assert all(torch.equal(main[name], whole[name]) for name in main)
    edit_config(folder, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=r"announces 0 layers .* hold 2 .*drop_mtp"):
        load(folder)
    assert_same_weights(load(folder, drop_mtp=True), dropped)


def test_announced_prediction_layers_that_are_not_there_are_refused(saved: Path) -> None:
    edit_config(saved, num_nextn_predict_layers=1)
    with pytest.raises(CheckpointError, match=r"announces 1 layers .* hold 0 .*drop_mtp"):
        load(saved)
    assert_same_weights(load(saved, drop_mtp=True), tiny_policy())


def test_rotary_frequencies_of_old_files_are_passed_over(saved: Path) -> None:
    rewrite(saved, stored_in(saved) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert_same_weights(load(saved), tiny_policy())


@pytest.mark.parametrize("name", ["plain", "q_lora_groups", "tied", "v2", "mtp"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_computes_the_same_from_what_is_saved(name: str, dtype: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_policy(tiny_policy(CONFIGS[name]), tmp_path, dtype=dtype, max_shard_bytes=30_000)
    ours = load(tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(key.startswith(("model.layers.3.", "model.layers.4.")) for key in info["unexpected_keys"])
    (sequence,) = random_sequences([12])
    with torch.no_grad():
        gap = packed_logits(ours, [sequence]) - theirs.eval()(torch.tensor([sequence])).logits[0]
    assert gap.abs().max() < 2e-5


def test_transformers_dequantises_the_same_values(tmp_path: Path) -> None:
    """At sizes that 128 divides: for others transformers cuts a weight into even blocks, unlike the release and vLLM."""
    transformers = pytest.importorskip("transformers")
    wide = replace(TINY, hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=2)
    heads = {"num_attention_heads": 2, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 128}
    model = tiny_policy(replace(wide, n_routed_experts=4, q_lora_rank=128, kv_lora_rank=64, **heads))
    save_policy(model, tmp_path, dtype="float8_e4m3fn", max_shard_bytes=300_000)
    ours = load(tmp_path)
    quantisation = transformers.FineGrainedFP8Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=quantisation
    )
    values = theirs.state_dict()
    assert [name for name, value in ours.state_dict().items() if not torch.equal(value, values[name])] == []
    (sequence,) = random_sequences([12])
    with torch.no_grad():
        gap = packed_logits(ours, [sequence]) - theirs.eval()(torch.tensor([sequence])).logits[0]
    assert gap.abs().max() < 2e-5
    assert (packed_logits(ours, [sequence]) - packed_logits(model, [sequence])).abs().max() > 1e-3  # it is FP8


def test_a_dense_policy_is_saved_and_loaded_by_the_same_functions(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    values = {"model_type": "qwen2", "vocab_size": 61, "num_key_value_heads": 2, **shape}
    model = DensePolicy(DenseConfig.of_shape(values))
    model.reset_parameters(0)
    save_policy(model, tmp_path, max_shard_bytes=30_000)
    loaded = load_policy(tmp_path)
    assert isinstance(loaded, DensePolicy)
    ours, theirs = hf_state_dict(model), hf_state_dict(loaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(reference[name], ours[name]) for name in ours)


@pytest.mark.parametrize("read", [read_config, load_policy])
def test_an_unknown_architecture_is_named(saved: Path, read: Callable[[Path], Any]) -> None:
    pytest.importorskip("transformers")
    edit_config(saved, model_type="qwen2")
    with pytest.raises(CheckpointError, match=r"config\.json.*DeepseekV3ForCausalLM.*Qwen2ForCausalLM"):
        read(saved)
    edit_config(saved, model_type="nothing")
    with pytest.raises(CheckpointError, match=r"config\.json.*model_type='nothing'"):
        read(saved)


def test_another_quantisation_is_named(saved: Path) -> None:
    edit_config(saved, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"config\.json has quantization_config with quant_method='awq'"):
        load_policy(saved)


@every_config
def test_an_empty_policy_has_the_buffers_of_a_new_one(config: PolicyConfig) -> None:
    """Were one computed when the policy is built, to start from zeros would be wrong."""
    empty, new = empty_policy(config, torch.bfloat16), DeepseekPolicy(config)
    assert {p.dtype for p in empty.parameters()} == {torch.bfloat16}
    assert [n for n, _ in empty.named_parameters()] == [n for n, _ in new.named_parameters()]  # ties included
    assert dict(empty.named_buffers()).keys() == dict(new.named_buffers()).keys()
    assert all(b.dtype == torch.float32 and torch.equal(b, new.get_buffer(n)) for n, b in empty.named_buffers())


def test_a_dense_checkpoint_in_fp8_is_dequantised(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    shape = {"hidden_size": 256, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = DensePolicy(DenseConfig.of_shape({"model_type": "llama", "vocab_size": 61, **shape}))
    model.reset_parameters(0)
    save_policy(model, tmp_path, dtype="float8_e4m3fn")
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    ours, theirs = hf_state_dict(model), hf_state_dict(load_policy(tmp_path))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        if is_quantised(name, tuple(weight.shape)):
            assert not torch.equal(theirs[name], weight), name
        assert (theirs[name] - weight).abs().max() <= 0.07 * weight.abs().max(), name
