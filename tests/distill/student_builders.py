"""Tiny students, their tokenizer and traces to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.student_config import DistillConfig
from distill.trace import R1_COMPLETION, Trace, render_completion, write_traces
from policy.checkpoint import atomic_folder, save_policy
from policy.config import PolicyConfig
from policy.deepseek import DeepseekPolicy
from policy.dense import DensePolicy
from policy.dense_config import DenseConfig
from policy.interface import Policy
from rollout.tokenizer import train_tokenizer

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
DEEPSEEK = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 256,
    "num_nextn_predict_layers": 1,
}


def make_trace(index: int = 0, **changes: Any) -> Trace:
    """The sum of two small numbers, worked."""
    a, b = 2 + index * 7 % 40, 3 + index * 11 % 30
    reasoning, answer = f"{a} and {b} are {a + b}." * (1 + index % 3), f"<answer>{a + b}</answer>"
    values: dict[str, Any] = {
        "question_id": f"sums/{index}",
        "question": f"What is {a} + {b}?",
        "reasoning": reasoning,
        "answer_text": answer,
        "completion": render_completion(R1_COMPLETION, reasoning, answer),
        "gold": str(a + b),
        "teacher": "a person",
        "source": "test",
        "finish_reason": "stop",
    }
    return Trace(**(values | changes))


def make_traces(count: int) -> list[Trace]:
    """Several of them."""
    return [make_trace(index) for index in range(count)]


def make_tokenizer(chat: str | None = CHAT) -> Any:
    """A tokenizer that knows such traces."""
    texts = [f"<user>{trace.question}\n<assistant>{trace.completion}" for trace in make_traces(40)]
    tokenizer = train_tokenizer(texts, 400, chat or "")
    tokenizer.chat_template = chat
    return tokenizer


def make_student(kind: str, tokenizer: Any, seed: int = 0) -> Policy:
    """An untrained student of a kind: llama, qwen2, qwen3 or deepseek."""
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model: Policy
    if kind == "deepseek":
        model = DeepseekPolicy(PolicyConfig(**DEEPSEEK, **ids))
    else:
        shape = LLAMA | {"model_type": kind, "bos_token_id": None} | ids
        model = DensePolicy(DenseConfig.of_shape(shape | ({"head_dim": 16} if kind == "qwen3" else {})))
    model.reset_parameters(seed)
    return model


def save_student(folder: Path, kind: str = "llama", tokenizer: Any = None) -> Path:
    """A student's checkpoint folder with its tokenizer."""
    tokenizer = tokenizer or make_tokenizer()
    with atomic_folder(folder) as temporary:
        save_policy(make_student(kind, tokenizer), temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def make_config(folder: Path, traces: Sequence[Trace] | None = None, **changes: Any) -> DistillConfig:
    """A config of a run in `folder`, whose traces are written beside it; its student is to be at folder / "init"."""
    path = folder / "traces.parquet"
    if not path.exists():
        write_traces(path, traces if traces is not None else make_traces(10))
    values: dict[str, Any] = {
        "name": "tiny",
        "run_dir": str(folder / "run"),
        "num_traces": 4,
        "num_epochs": 2,
        "student": {"init": folder / "init"},
        "data": {"path": path, "max_tokens": 128},
        "trainer": {"lr": 3e-3, "num_threads": 1, "max_tokens_per_microbatch": 256, "warmup_share": 0.2},
        "checkpoint": {"every_steps": 2, "keep_last": 9},
    }
    for key, value in changes.items():
        known = values.get(key)
        values[key] = known | value if isinstance(known, dict) and isinstance(value, dict) else value
    return DistillConfig.model_validate(values)
