"""The policy's shape, field by field as in Hugging Face's DeepseekV2Config and DeepseekV3Config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
)
# The others change what the weights compute: a config.json that lacks one must not be read with a guess.
_MAY_LACK = {
    "initializer_range",
    "tie_word_embeddings",
    "eos_token_id",
    "pad_token_id",
    "rope_scaling",
    "num_nextn_predict_layers",
}
# What says how to compute, not what: config.json does not hold it.
_NOT_STORED = {"precision"}
TopkMethod = Literal["noaux_tc", "group_limited_greedy", "greedy"]
Precision = Literal["bf16", "fp8"]


class PolicyConfigError(ValueError):
    """A config that is not, or not completely, a policy this code can build."""


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071) as DeepSeek extends it: `factor` times the original context, two attention temperatures.

    Rotated parts are scaled by m(mscale) / m(mscale_all_dim) and all scores by m(mscale_all_dim)**2, with
    m(a) = 0.1 * a * ln(factor) + 1.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise PolicyConfigError(f"rope_scaling.factor must be at least 1, not {self.factor}")
        if self.original_max_position_embeddings < 1:
            raise PolicyConfigError("rope_scaling.original_max_position_embeddings must be at least 1")
        if not self.beta_fast > self.beta_slow > 0:
            raise PolicyConfigError(
                f"rope_scaling needs beta_fast > beta_slow > 0, not {self.beta_fast} and {self.beta_slow}"
            )

    def temperature(self, mscale: float) -> float:
        """m(mscale), at least 1."""
        return 0.1 * mscale * math.log(self.factor) + 1.0

    @classmethod
    def from_hf_dict(cls, values: Mapping[str, Any]) -> YarnScaling:
        """Read `rope_scaling` or `rope_parameters` of a config.json; keys of other meaning are an error."""
        known = {f.name for f in fields(cls)}
        picked = {k: v for k, v in values.items() if k in known and v is not None}
        unknown = values.keys() - known - {"type", "rope_type", "rope_theta"}
        if unknown:
            raise PolicyConfigError(
                f"rope_scaling has {', '.join(sorted(unknown))}, which this policy does not compute"
            )
        if missing := sorted({"factor", "original_max_position_embeddings"} - picked.keys()):
            raise PolicyConfigError(f"rope_scaling lacks {', '.join(missing)}")
        if bad := [f"{name}={value!r}" for name, value in picked.items() if not _is_a(value, float)]:
            raise PolicyConfigError(f"rope_scaling has values that are no numbers: {', '.join(bad)}")
        return cls(**picked)


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """A DeepSeek-V2 or V3 architecture; sizes are in elements, names are Hugging Face's.

    `topk_method` names the router: `noaux_tc` is V3's (arXiv 2412.19437, section 2.1.2: sigmoid scores, a bias for the
    choice, groups by the sum of their top 2), `greedy` and `group_limited_greedy` are V2's (arXiv 2405.04434, section
    2.2: softmax scores, groups by their maximum). `num_nextn_predict_layers` is the depth of multi-token prediction.
    `precision` is that of projections' and experts' products: the type of the weights ("bf16", whatever that is), or
    blockwise FP8 (V3, section 3.3). It is the run's own affair, so config.json neither holds nor needs it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    first_k_dense_replace: int = 1
    topk_method: TopkMethod = "noaux_tc"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    num_nextn_predict_layers: int = 0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    precision: Precision = "bf16"

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, Mapping):  # as TOML and JSON give it
            object.__setattr__(self, "rope_scaling", YarnScaling.from_hf_dict(self.rope_scaling))
        if self.topk_method not in get_args(TopkMethod):
            raise PolicyConfigError(f"topk_method={self.topk_method!r} is not one of {', '.join(get_args(TopkMethod))}")
        if self.precision not in get_args(Precision):
            raise PolicyConfigError(f"precision={self.precision!r} is not one of {', '.join(get_args(Precision))}")
        if self.num_nextn_predict_layers < 0:
            raise PolicyConfigError(f"num_nextn_predict_layers must be at least 0, not {self.num_nextn_predict_layers}")
        if self.topk_method == "greedy" and self.n_group != 1:
            raise PolicyConfigError(f"topk_method='greedy' knows no groups, so n_group must be 1, not {self.n_group}")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise PolicyConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise PolicyConfigError(f"q_lora_rank must be at least 1, or None for none, not {self.q_lora_rank}")
        if self.qk_rope_head_dim % 2:
            raise PolicyConfigError(f"qk_rope_head_dim must be even, not {self.qk_rope_head_dim}")
        if self.v_head_dim > self.qk_head_dim:
            raise PolicyConfigError(f"v_head_dim={self.v_head_dim} must not exceed qk_nope_head_dim + qk_rope_head_dim")
        if self.n_routed_experts % self.n_group:
            raise PolicyConfigError(f"n_group={self.n_group} does not divide n_routed_experts={self.n_routed_experts}")
        if self.topk_group > self.n_group:
            raise PolicyConfigError(f"topk_group={self.topk_group} exceeds n_group={self.n_group}")
        if self.num_experts_per_tok > self.n_routed_experts // self.n_group * self.topk_group:
            raise PolicyConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the experts of topk_group={self.topk_group} groups"
            )
        if self.topk_method == "noaux_tc" and self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise PolicyConfigError("a routing group needs at least 2 experts: its score is the sum of its top 2")

    @property
    def qk_head_dim(self) -> int:
        """Query and key width per head: the part without rotation and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Cached values per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def attention_scale(self) -> float:
        """What attention scores are multiplied by before the softmax."""
        yarn = self.rope_scaling
        return self.qk_head_dim**-0.5 * (1.0 if yarn is None else yarn.temperature(yarn.mscale_all_dim) ** 2)

    @property
    def scoring_func(self) -> Literal["sigmoid", "softmax"]:
        """The router's scores of an expert: each by itself in V3, relative to all in V2."""
        return "sigmoid" if self.topk_method == "noaux_tc" else "softmax"

    @property
    def model_type(self) -> Literal["deepseek_v3", "deepseek_v2"]:
        """Hugging Face's name of the architecture."""
        return "deepseek_v3" if self.topk_method == "noaux_tc" else "deepseek_v2"

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts, those of multi-token prediction left out."""
        return max(0, self.num_hidden_layers - self.first_k_dense_replace)

    @classmethod
    def from_hf_dict(cls, values: Mapping[str, Any]) -> PolicyConfig:
        """Read a `config.json`; what this code can't compute (another architecture, another rope) is an error.

        `quantization_config` speaks about how weights are stored, so it is left to who reads them.
        """
        model_type = values.get("model_type")
        if model_type not in ("deepseek_v2", "deepseek_v3"):
            raise PolicyConfigError(
                f"config.json says model_type={model_type!r}; this policy is deepseek_v2 or deepseek_v3. "
                "Choose a checkpoint of that architecture."
            )
        rope = dict(values.get("rope_parameters") or {}) | dict(values.get("rope_scaling") or {})
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        refused = {
            f"rope type {rope_type!r}": rope_type not in ("default", "yarn"),
            "rope_interleave=false": values.get("rope_interleave") is False,
            "attention_bias=true": bool(values.get("attention_bias")),
            f"hidden_act={values.get('hidden_act')!r}": values.get("hidden_act", "silu") != "silu",
            f"moe_layer_freq={values.get('moe_layer_freq')!r}": values.get("moe_layer_freq", 1) != 1,
        }
        if bad := [name for name, present in refused.items() if present]:
            raise PolicyConfigError(f"config.json asks for {', '.join(bad)}, which this policy does not compute")
        known = {f.name for f in fields(cls)} - _NOT_STORED
        picked = {k: v for k, v in values.items() if k in known and k != "rope_scaling"}
        if rope_type == "yarn":
            picked["rope_scaling"] = YarnScaling.from_hf_dict(rope)
        if "rope_theta" in rope:
            picked.setdefault("rope_theta", rope["rope_theta"])
        if isinstance(picked.get("eos_token_id"), list):
            picked["eos_token_id"] = picked["eos_token_id"][0]
        if model_type == "deepseek_v3":  # transformers leaves it out, since V3 has but one
            picked.setdefault("topk_method", "noaux_tc")
        if missing := sorted(known - _MAY_LACK - picked.keys()):
            raise PolicyConfigError(f"config.json lacks {', '.join(missing)}")
        types = get_type_hints(cls)
        if bad := [f"{name}={value!r}" for name, value in picked.items() if not _is_a(value, types[name])]:
            raise PolicyConfigError(f"config.json has values of another type than the policy's: {', '.join(bad)}")
        config = cls(**picked)
        stated = values.get("scoring_func", config.scoring_func)
        if config.model_type != model_type or config.scoring_func != stated:
            raise PolicyConfigError(
                f"config.json combines model_type={model_type!r}, topk_method={config.topk_method!r} and "
                f"scoring_func={stated!r}; this policy computes noaux_tc with sigmoid (deepseek_v3) and "
                "greedy or group_limited_greedy with softmax (deepseek_v2)"
            )
        return config

    def to_hf_dict(self, dtype: str = "float32") -> dict[str, Any]:
        """A `config.json` complete enough for transformers and for vLLM (which needs topk_method and scoring_func)."""
        yarn = self.rope_scaling
        return {name: value for name, value in asdict(self).items() if name not in _NOT_STORED} | {
            "architectures": ["DeepseekV3ForCausalLM" if self.model_type == "deepseek_v3" else "DeepseekV2ForCausalLM"],
            "model_type": self.model_type,
            "dtype": dtype,
            "num_key_value_heads": self.num_attention_heads,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_interleave": True,
            "rope_scaling": None if yarn is None else {"type": "yarn", "rope_type": "yarn", **asdict(yarn)},
            "scoring_func": self.scoring_func,
            "moe_layer_freq": 1,
            "bos_token_id": None,
        }


def _is_a(value: Any, wanted: Any) -> bool:
    """Whether a JSON value may stand for a type; a whole number may stand for a float, a truth value for no number."""
    if isinstance(value, bool):
        return wanted is bool
    if get_origin(wanted) is Literal:
        return value in get_args(wanted)
    return isinstance(value, int | float if wanted is float else wanted)
