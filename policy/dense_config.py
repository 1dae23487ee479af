"""The config of dense models: a checkpoint's `config.json`, read by transformers, refused where packing would change it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from policy.config import PolicyConfigError

# What a config may set that changes logits outside of the layers and attention, and the value that changes nothing.
_NEUTRAL = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logits_scaling": 1,
    "logit_scale": 1,
    "quantization_config": None,
    "is_encoder_decoder": False,
}
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Frequencies that depend on the longest position in the batch would make packed documents see each other.
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True)
class DenseConfig:
    """A `config.json` of a dense model: `values` as they stand in the file, `hf` as transformers understands them."""

    values: dict[str, Any]
    hf: Any = field(compare=False, repr=False)

    @classmethod
    def from_hf_dict(cls, values: Mapping[str, Any]) -> DenseConfig:
        """Read a `config.json`; an architecture that can't be packed, or asks for more, is a PolicyConfigError."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        model_type = values.get("model_type")
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(model_type))
        if architecture is None:
            raise PolicyConfigError(f"config.json says model_type={model_type!r}: transformers knows no such causal LM")
        if (values.get("architectures") or [architecture]) != [architecture]:
            raise PolicyConfigError(f"config.json says architectures={values['architectures']}, not [{architecture!r}]")
        try:
            hf = AutoConfig.for_model(**copy.deepcopy(dict(values)))
        except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
            raise PolicyConfigError(f"transformers can't read this {model_type} config.json: {error}") from error
        if refused := list(_refusals(hf)):
            raise PolicyConfigError(
                f"config.json asks for {', '.join(refused)}, which packed dense policies don't compute"
            )
        return cls({**values, "architectures": [architecture]}, hf)

    @classmethod
    def of_shape(cls, values: Mapping[str, Any]) -> DenseConfig:
        """The config of a new model: as `from_hf_dict`, with every default of transformers written down."""
        return cls.from_hf_dict({**cls.from_hf_dict(values).hf.to_dict(), "architectures": None})

    def to_hf_dict(self, dtype: str = "float32") -> dict[str, Any]:
        """The `config.json` that was read, with the type of the weights."""
        return {name: value for name, value in self.values.items() if name != "torch_dtype"} | {"dtype": dtype}

    @property
    def vocab_size(self) -> int:
        return self.hf.vocab_size

    @property
    def max_position_embeddings(self) -> int:
        return self.hf.max_position_embeddings

    @property
    def tie_word_embeddings(self) -> bool:
        return bool(self.hf.tie_word_embeddings)

    @property
    def eos_token_id(self) -> int | None:
        """The end token; the first, where the checkpoint names several."""
        eos = self.hf.eos_token_id
        return eos[0] if isinstance(eos, list) else eos

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, key and value heads, and their width: what a token costs in the decoding cache, twice."""
        width = getattr(self.hf, "head_dim", None) or self.hf.hidden_size // self.hf.num_attention_heads
        return self.hf.num_hidden_layers, self.hf.num_key_value_heads, width


def _refusals(hf: Any) -> Iterator[str]:
    for name, neutral in _NEUTRAL.items():
        if getattr(hf, name, None) not in (None, neutral):
            yield f"{name}={getattr(hf, name)!r}"
    for name in _EXPERT_COUNTS:
        if (getattr(hf, name, None) or 0) > 1:
            yield f"{name}={getattr(hf, name)} (a mixture of experts)"
    for name, value in hf.to_dict().items():
        # Log-probabilities of the same weights must not change from one forward pass to the next.
        of_the_decoder = not name.startswith(("classifier", "summary"))
        if of_the_decoder and ("dropout" in name or name.endswith("pdrop")) and value:
            yield f"{name}={value}"
    if kinds := sorted(set(_rope_types(getattr(hf, "rope_parameters", None))) & _BATCH_DEPENDENT_ROPE):
        yield f"rope_type={', '.join(kinds)}"
    for name in ("vocab_size", "max_position_embeddings", "num_hidden_layers", "num_key_value_heads"):
        if not isinstance(getattr(hf, name, None), int):
            yield f"no {name}"


def _rope_types(rope: Any) -> Iterator[str]:
    """Of one set of rotary parameters, or of one per kind of layer."""
    if isinstance(rope, Mapping):
        if isinstance(kind := rope.get("rope_type"), str):
            yield kind
        for inner in rope.values():
            yield from _rope_types(inner)
