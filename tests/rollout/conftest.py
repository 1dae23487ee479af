"""Tiny policies with weights large enough to tell right from wrong, and real engines that start once per session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from policy.checkpoint import save_policy
from policy.config import PolicyConfig
from policy.deepseek import DeepseekPolicy
from policy.logprobs import token_logprobs
from rollout.cluster import EngineConfig, RayEngine, start_cluster, start_engine, stop_cluster
from rollout.engine import Completion

VOCAB = 96


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "stack: starts Ray or vLLM (seconds to start, skipped where they are missing)")


@pytest.fixture(scope="session")
def make_policy() -> Callable[[int], DeepseekPolicy]:
    """A policy of 0.4M parameters from a seed: weights of standard deviation 0.08, norms and biases not trivial."""
    config = PolicyConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        q_lora_rank=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
        initializer_range=0.08,
        max_position_embeddings=256,
    )

    def make(seed: int) -> DeepseekPolicy:
        model = DeepseekPolicy(config)
        model.reset_parameters(seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.state_dict().items():
                if "norm" in name:
                    weight.copy_(1 + 0.1 * torch.randn(weight.shape, generator=generator))
                elif name.endswith("bias"):
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def checkpoint_dir(make_policy: Callable[[int], DeepseekPolicy], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `make_policy(0)`."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_policy(make_policy(0), folder)
    return folder


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Eight prompts of 5 to 12 tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (5 + i,), generator=generator).tolist() for i in range(8)]


@pytest.fixture(scope="session")
def largest_gap() -> Callable[..., float]:
    """The largest |engine's - policy's| log-probability over all completion tokens, in nats."""

    @torch.no_grad()
    def gap(
        model: DeepseekPolicy, prompts: list[list[int]], completions: list[Completion], temperature: float = 1.0
    ) -> float:
        largest = 0.0
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = torch.tensor(prompt + completion.token_ids)
            own, *_ = token_logprobs(
                model, ids, torch.arange(len(ids)), torch.tensor([0, len(ids)]), temperature=temperature
            )
            theirs = torch.tensor(completion.logprobs)
            largest = max(largest, float((own[len(prompt) :] - theirs).abs().max()))
        return largest

    return gap


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray node of this test session; yields its folder of logs."""
    pytest.importorskip("ray")
    log_dir = tmp_path_factory.mktemp("logs")
    start_cluster(2, log_dir)
    yield log_dir
    stop_cluster()


@pytest.fixture(scope="session")
def vllm_engine(ray_cluster: Path, checkpoint_dir: Path) -> Iterator[RayEngine]:
    """One vLLM engine in an actor for the whole session; its weights change from test to test."""
    pytest.importorskip("vllm")
    engine = start_engine(EngineConfig(max_model_len=128), checkpoint_dir, ray_cluster / "vllm.log")
    yield engine
    engine.close()
