"""The policy's shape, field by field as in Hugging Face's DeepseekV3Config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

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
_MAY_LACK = {"initializer_range", "tie_word_embeddings", "eos_token_id", "pad_token_id"}


class PolicyConfigError(ValueError):
    """A config that is not, or not completely, a policy this code can build."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """A DeepSeek-V3 architecture (arXiv 2412.19437, section 2); sizes are in elements, names are Hugging Face's."""

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
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
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
        if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise PolicyConfigError("a routing group needs at least 2 experts: its score is the sum of its top 2")

    @property
    def qk_head_dim(self) -> int:
        """Query and key width per head: the part without rotation and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Cached values per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @classmethod
    def from_hf_dict(cls, values: Mapping[str, Any]) -> PolicyConfig:
        """Read a `config.json`; what this code can't compute (another architecture, scaled rope) is an error."""
        model_type = values.get("model_type")
        if model_type != "deepseek_v3":
            raise PolicyConfigError(
                f"config.json says model_type={model_type!r}; this policy is deepseek_v3. "
                "Choose a checkpoint of that architecture."
            )
        rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        refused = {
            "rope scaling": rope_type != "default",
            "rope_interleave=false": values.get("rope_interleave") is False,
            "attention_bias=true": bool(values.get("attention_bias")),
            "quantization_config": values.get("quantization_config") is not None,
            f"hidden_act={values.get('hidden_act')!r}": values.get("hidden_act", "silu") != "silu",
            f"scoring_func={values.get('scoring_func')!r}": values.get("scoring_func", "sigmoid") != "sigmoid",
        }
        if bad := [name for name, present in refused.items() if present]:
            raise PolicyConfigError(f"config.json asks for {', '.join(bad)}, which this policy does not compute")
        known = {f.name for f in fields(cls)}
        picked = {k: v for k, v in values.items() if k in known}
        if "rope_theta" in rope:
            picked.setdefault("rope_theta", rope["rope_theta"])
        if isinstance(picked.get("eos_token_id"), list):
            picked["eos_token_id"] = picked["eos_token_id"][0]
        if missing := sorted(known - _MAY_LACK - picked.keys()):
            raise PolicyConfigError(f"config.json lacks {', '.join(missing)}")
        types = get_type_hints(cls)
        if bad := [f"{name}={value!r}" for name, value in picked.items() if not _is_a(value, types[name])]:
            raise PolicyConfigError(f"config.json has values of another type than the policy's: {', '.join(bad)}")
        return cls(**picked)

    def to_hf_dict(self, dtype: str = "float32") -> dict[str, Any]:
        """A `config.json` complete enough for transformers and for vLLM (which needs topk_method and scoring_func)."""
        return asdict(self) | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "dtype": dtype,
            "num_key_value_heads": self.num_attention_heads,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_interleave": True,
            "rope_scaling": None,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "num_nextn_predict_layers": 0,
            "bos_token_id": None,
        }


def _is_a(value: Any, wanted: Any) -> bool:
    """Whether a JSON value may stand for a type; a whole number may stand for a float, a truth value for no number."""
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, int | float if wanted is float else wanted)
