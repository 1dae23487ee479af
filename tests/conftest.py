"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tiny models gain nothing from threads, and threads that wait for each other crawl beside other programs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A run sets the process's number of threads, on which the last bit of a product depends."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of recorded answers and datasets beside the checkout; the test is skipped where it is absent."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the shared folder with recorded answers and datasets at {path}")
    return path


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained policy that vLLM's CPU kernel takes, with its tokenizer."""
    from policy.checkpoint import atomic_folder, save_policy
    from policy.config import PolicyConfig
    from policy.deepseek import DeepseekPolicy
    from rollout.arithmetic import CorpusMix, corpus_document
    from rollout.templates import R1_ZERO
    from rollout.tokenizer import train_tokenizer

    documents = [corpus_document(random.Random(i), CorpusMix()) for i in range(200)]
    tokenizer = train_tokenizer(
        [R1_ZERO.replace("{question}", q) + c for q, c in documents], 512, "{{ messages[0].content }}"
    )
    config = PolicyConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        qk_nope_head_dim=16,
        v_head_dim=16,
        initializer_range=0.08,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = DeepseekPolicy(config)
    model.reset_parameters(0)
    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    with atomic_folder(folder) as temporary:
        save_policy(model, temporary)
        tokenizer.save_pretrained(temporary)
    return folder
