"""`groupzero model`: every kind of target leads to the right figures, and what is wrong is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from policy.config import PolicyConfig
from rollout.errors import UserError
from scripts.model_command import describe_model, run_model

ROOT = Path(__file__).resolve().parents[2]
# A config.json as released: DeepSeek-V3's, with what is no part of the shape left in.
RELEASED_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_layer_freq": 1,
    "ep_size": 1,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "aux_loss_alpha": 0.001,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "max_position_embeddings": 163840,
    "initializer_range": 0.02,
    "attention_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
SHAPE = """
hidden_size = 32
intermediate_size = 48
moe_intermediate_size = 16
num_hidden_layers = 2
num_attention_heads = 2
n_routed_experts = 4
num_experts_per_tok = 2
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 4
v_head_dim = 8
max_position_embeddings = 512
"""
# By hand: embedding and head 2 x 50 x 32; per layer attention 32*24 + 32*20 + 16*32 + 16*32 and norms 64 + 16; dense MLP
# 3*32*48; four experts and a shared one of 3*32*16 each, router 4*32; the last norm 32.
SHAPE_TOTAL = 2 * 50 * 32 + 2 * (768 + 640 + 512 + 512 + 80) + 4608 + 5 * 1536 + 128 + 32
SHAPE_ACTIVE = SHAPE_TOTAL - 50 * 32 - 2 * 1536


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def without(figures: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name not in names}


def test_the_figures_of_v3() -> None:
    figures = describe_model("deepseek_v3")
    assert figures["total_params"] == 671_026_404_352
    assert figures["active_params"] == 36_625_603_584
    assert figures["mtp_params"] == 11_610_067_968
    assert sum(figures["params_by_role"].values()) == figures["total_params"]
    assert figures["kv_cache_bytes_per_token"] == 70_272
    assert figures["mha_kv_cache_bytes_per_token"] == 61 * 32768 * 2
    assert figures["kv_cache_bytes_per_sequence"] == 4096 * 70_272
    attention = 61 * 2 * 128 * (192 + 128) * 4097 / 2
    assert figures["attention_flops_per_token"] == attention
    assert figures["flops_per_token"] == pytest.approx(2 * figures["active_params"] + attention, rel=1e-4)
    assert figures["training_flops_per_token"] == 3 * figures["flops_per_token"]


def test_the_comparison_behind_93_3_percent_is_said_in_words() -> None:
    figures = describe_model("deepseek_v2")
    assert round(figures["kv_cache_saving_against_deepseek_67b_at_6_bits"], 3) == 0.933
    assert round(figures["kv_cache_saving_against_deepseek_67b"], 3) == 0.822
    assert round(figures["kv_cache_saving"], 3) == 0.982
    (said,) = [sentence for sentence in figures["assumptions"] if "67B" in sentence]
    assert "8 key-value heads" in said
    assert "93.3% less at the 6 bits per value" in said
    # Nothing is said of models that are smaller than the one compared with.
    assert not [name for name in describe_model("deepseek_v2_lite") if "67b" in name]


def test_a_released_config_json_is_the_named_config(tmp_path: Path) -> None:
    file = write(tmp_path / "DeepSeek-R1" / "config.json", json.dumps(RELEASED_V3))
    named = describe_model("deepseek_v3")
    assert without(describe_model(file), "source") == without(named, "source")
    assert without(describe_model(file.parent), "source") == without(named, "source")
    assert PolicyConfig.from_hf_dict(RELEASED_V3) == _named_config("deepseek_v3")


def _named_config(name: str) -> PolicyConfig:
    import tomllib

    return PolicyConfig(**tomllib.loads((ROOT / "configs/models" / f"{name}.toml").read_text()))


@pytest.mark.parametrize(
    "name", ["deepseek_v3", "DeepSeek-V3", "deepseek-v3", str(ROOT / "configs/models/deepseek_v3.toml")]
)
def test_ways_to_name_a_model(name: str) -> None:
    figures = describe_model(name)
    assert (figures["source"], figures["total_params"]) == (name, 671_026_404_352)


@pytest.mark.parametrize("text", [f"vocab_size = 50\n{SHAPE}", f"[model]\nvocab_size = 50\n{SHAPE}"])
def test_a_toml_with_a_shape(tmp_path: Path, text: str) -> None:
    figures = describe_model(write(tmp_path / "small.toml", text))
    assert (figures["total_params"], figures["active_params"]) == (SHAPE_TOTAL, SHAPE_ACTIVE)
    assert figures["kv_cache_bytes_per_token"] == 2 * 2 * (16 + 4)
    assert figures["mha_kv_cache_bytes_per_token"] == 2 * 2 * 2 * (8 + 8)


def test_a_training_config_leads_to_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    base, run = describe_model("configs/quickstart_base.toml"), describe_model("configs/quickstart.toml")
    assert run["source"] == "configs/quickstart.toml -> configs/quickstart_base.toml"
    assert without(run, "source") == without(base, "source")
    assert base["params_by_role"]["embedding"] == 512 * 128
    assert base["context_tokens"] == 2048  # no more than the model takes


def test_a_dense_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    values = {
        "model_type": "qwen2",
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
    }
    figures = describe_model(write(tmp_path / "config.json", json.dumps(values)).parent, context_tokens=64)
    layer = 2 * 32 * 32 + 2 * 32 * 16 + (32 + 16 + 16) + 3 * 32 * 48 + 64
    assert figures["total_params"] == figures["active_params"] == 40 * 32 + 2 * layer + 32
    assert figures["mtp_params"] == 0
    assert figures["kv_cache_bytes_per_token"] == 2 * 2 * 2 * 2 * 8
    assert figures["mha_kv_cache_bytes_per_token"] == 2 * figures["kv_cache_bytes_per_token"]


def test_memory_follows_precision_and_sharding() -> None:
    alone = describe_model("deepseek_v2_lite", precision="bf16")["training_memory"]
    assert alone["total_bytes_per_rank"] == 18 * 15_706_484_224
    spread = describe_model("deepseek_v2_lite", precision="fp32", num_ranks=64, expert_parallel=8)["training_memory"]
    assert spread["optimizer_states_bytes"] == 8 * 15_706_484_224 // 64
    assert spread["gathered_bytes"] > 0
    assert (
        spread["total_bytes_per_rank"]
        == sum(size for name, size in spread.items() if name.endswith("s_bytes")) + (spread["gathered_bytes"])
    )


def test_json_is_what_describe_gives(capsys: pytest.CaptureFixture[str]) -> None:
    run_model("deepseek_v2", as_json=True, context_tokens=1000, precision="fp8", num_ranks=16, expert_parallel=8)
    expected = describe_model("deepseek_v2", context_tokens=1000, precision="fp8", num_ranks=16, expert_parallel=8)
    assert json.loads(capsys.readouterr().out) == expected
    assert expected["context_tokens"] == 1000


def test_the_table_shows_the_figures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    run_model("deepseek_v3", num_ranks=256, expert_parallel=32)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "deepseek_v3 (deepseek_v3)",
        "total 671.0 B 671,026,404,352",
        "active per token 36.6 B 36,625,603,584",
        "multi-token prediction 11.6 B counted apart; 688.1 M active",
        "per token 68.6 KiB 70,272 bytes, 35,136 values",
        "multi-head attention 3.81 MiB 56.9 times as much",
        "training 250.5 GFLOPs forward and backward",
        "memory to train, bf16, each of 256 ranks, experts over 32",
    ):
        assert line in lines


def test_brackets_in_a_path_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "[bold] a" / "[red].toml", f"vocab_size = 50\n{SHAPE}")
    run_model(str(file))
    assert "[bold] a/[red].toml" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "hidden_size = ", r"a\.toml: .*[Ii]nvalid"),
        ("a.toml", f"vocab_size = 50\nwidth = 3\n{SHAPE}", r"not the shape of a model: .*'width'"),
        ("a.toml", SHAPE, "not the shape of a model: .*'vocab_size'"),
        ("a.toml", f"vocab_size = 50\n{SHAPE}qk_rope_head_dim = 4", r"a\.toml: .*overwrite"),
        ("config.json", "{", r"config\.json: "),
        ("config.json", "[]", "holds no JSON object"),
        ("config.json", '{"model_type": "deepseek_v3"}', "config.json lacks .*hidden_size"),
        ("config.json", '{"model_type": "deepseek_v9"}', "deepseek_v9"),
        ("config.json", '{"model_type": "no_such"}', "no_such"),
    ],
)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        describe_model(write(tmp_path / name, text))


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("deepseek_v33", {}, r"deepseek_v33: there is no such .* did you mean deepseek_v3\?"),
        ("nothing", {}, "the named models are deepseek_v2, deepseek_v2_lite, deepseek_v3"),
        ("deepseek_v3", {"precision": "int8"}, "deepseek_v3: precision must be one of"),
        (
            "deepseek_v3",
            {"num_ranks": 12, "expert_parallel": 8},
            "deepseek_v3: expert_parallel=8 does not divide the number of ranks, 12",
        ),
        ("deepseek_v3", {"context_tokens": 0}, "context tokens must be at least 1"),
    ],
)
def test_what_can_not_be_answered_is_refused(target: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        describe_model(target, **arguments)


def test_a_folder_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a checkpoint: it has no config\.json"):
        describe_model(tmp_path)


def test_a_named_model_needs_no_torch() -> None:
    code = (
        "import sys\nfrom scripts.model_command import describe_model\n"
        "print(describe_model('deepseek_v3')['mtp_params'], sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "11610067968 []\n", done.stderr
