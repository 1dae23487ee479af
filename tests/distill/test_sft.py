"""Supervised training: it learns, is kept by content, stops in good order, and measures what it says."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.sft import SftConfig, SftError, output_folder, train_sft
from policy.checkpoint import load_policy
from rollout.interrupt import RunInterrupted
from rollout.run import SilentObserver
from rollout.tokenizer import load_tokenizer

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": 256,
}


class Recorder(SilentObserver):
    """Keeps the metrics of each step; may ask the process to stop at one of them."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.metrics: list[dict[str, Any]] = []
        self.stop_at = stop_at

    def step(self, step: int, num_steps: int, metrics: Mapping[str, Any]) -> None:
        self.metrics.append(dict(metrics))
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)


def make_config(folder: Path, **changes: Any) -> SftConfig:
    generator = {"source": "generator", "generator": "arithmetic"}
    values = {
        "name": "tiny",
        "output_dir": folder,
        "vocab_size": 512,
        "tokenizer_documents": 50,
        "num_documents": 8,
        "max_steps": 6,
        "num_threads": 1,
        "model": SHAPE,
        "data": generator | {"generator": "arithmetic_corpus"},
        "optimizer": {"decay_steps": 2},
        "eval": {
            "data": generator | {"split": "heldout"},
            "num_problems": 2,
            "num_samples": 1,
            "every_steps": 3,
            "max_completion_tokens": 8,
            "decay_at_pass_at_1": 1.0,
        },
    }
    return SftConfig.model_validate(values | changes)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_policy(folder).state_dict()


def test_the_loss_falls_and_the_result_is_a_checkpoint_with_its_tokenizer(tmp_path: Path) -> None:
    observer = Recorder()
    result = train_sft(make_config(tmp_path, max_steps=30), observer)
    losses = [metrics["loss"] for metrics in observer.metrics]
    assert len(losses) == 30
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    tokenizer = load_tokenizer(result.folder)
    assert load_policy(result.folder).config.vocab_size == len(tokenizer)
    assert load_policy(result.folder).config.eos_token_id == tokenizer.eos_token_id
    quality = json.loads((result.folder / "quality.json").read_text())
    assert quality == {"pass_at_1": result.pass_at_1, "steps": 30, "seed": 0}


def test_the_same_config_trains_once_and_any_change_trains_anew(tmp_path: Path) -> None:
    first = train_sft(make_config(tmp_path), SilentObserver())
    again = Recorder()
    assert train_sft(make_config(tmp_path), again).folder == first.folder
    assert again.metrics == []
    assert output_folder(make_config(tmp_path, seed=1)) != first.folder
    assert output_folder(make_config(tmp_path, num_documents=9)) != first.folder


def test_the_content_of_a_data_file_is_part_of_what_is_kept(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1", "answer": "2"}\n')
    config = make_config(tmp_path, data={"source": "jsonl", "path": str(rows)}, num_documents=1)
    before = output_folder(config)
    rows.write_text('{"question": "1 + 1", "answer": "3"}\n')
    assert output_folder(config) != before


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = train_sft(make_config(tmp_path / "whole"), SilentObserver())
    with pytest.raises(RunInterrupted, match="step 4"):
        train_sft(make_config(tmp_path / "cut"), Recorder(stop_at=4))
    observer = Recorder()
    cut = train_sft(make_config(tmp_path / "cut"), observer)
    assert len(observer.metrics) == 2
    theirs = weights_of(whole.folder)
    assert all(torch.equal(value, theirs[name]) for name, value in weights_of(cut.folder).items())
    assert not list(cut.folder.parent.glob("*.partial*"))


def test_rates_fall_from_the_measured_quality_and_a_poor_model_is_an_error(tmp_path: Path) -> None:
    good_enough: dict[str, Any] = make_config(tmp_path).model_dump() | {"max_steps": 50}
    good_enough["eval"]["decay_at_pass_at_1"] = 0.0
    observer = Recorder()
    train_sft(SftConfig.model_validate(good_enough), observer)
    assert len(observer.metrics) == 3 + 2  # the first measurement at step 3, then decay_steps
    demanding = make_config(tmp_path).model_dump()
    demanding["eval"]["required_pass_at_1"] = 1.0
    with pytest.raises(SftError, match=r"below eval\.required_pass_at_1=1"):
        train_sft(SftConfig.model_validate(demanding), SilentObserver())
    assert not output_folder(SftConfig.model_validate(demanding)).exists()


def test_bad_shapes_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hidden"):
        make_config(tmp_path, model=SHAPE | {"hidden": 3})
    with pytest.raises(ValueError, match="exactly one of init and model"):
        make_config(tmp_path, model=None)
    with pytest.raises(ValueError, match="n_group=3"):
        make_config(tmp_path, model=SHAPE | {"n_group": 3})
