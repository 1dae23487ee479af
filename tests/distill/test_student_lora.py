"""Adapters: they change nothing at first, alone learn, and are what peft makes of their files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import lora
from distill.lora import LoraConfig, add_adapters, check_peft, merged_weights
from distill.student_config import DistillConfig
from policy.atomic import CheckpointError
from policy.checkpoint import hf_state_dict, load_policy, save_policy
from policy.dense import DensePolicy
from rollout.errors import UserError
from rollout.interrupt import RunInterrupted
from tests.distill.student_builders import make_config, make_student, make_tokenizer, save_student
from tests.distill.test_student import HELD_OUT, Watcher, assert_same, losses, run

CONFIG = LoraConfig(rank=4, alpha=8)


def lora_config(folder: Path, **changes: Any) -> DistillConfig:
    folder.mkdir(exist_ok=True)
    if not (folder / "init").exists():
        save_student(folder / "init")
    return make_config(folder, lora={"rank": 4, "alpha": 8, "dropout": 0.1}, trainer={"lr": 1e-2}, **changes)


def test_without_peft_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{sys.executable} -m pip install peft"):
        check_peft()


def test_fresh_adapters_change_nothing_and_alone_have_gradients() -> None:
    pytest.importorskip("peft")
    plain, model = (make_student("llama", make_tokenizer()) for _ in range(2))
    assert isinstance(model, DensePolicy)
    add_adapters(model, CONFIG, seed=0)
    merged, expected = merged_weights(model), hf_state_dict(plain)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in merged.items())
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(learning) == 2 * 2 * 7  # A and B, layers, modules
    assert all(".lora_" in name for name in learning)


def test_targets_and_students_that_can_have_none_are_refused() -> None:
    pytest.importorskip("peft")
    with pytest.raises(UserError, match=r"names c_attn; the student has down_proj, gate_proj"):
        add_adapters(
            make_student("llama", make_tokenizer()), LoraConfig(rank=1, alpha=1, target_modules=("c_attn",)), 0
        )
    with pytest.raises(UserError, match="dense students"):
        add_adapters(make_student("deepseek", make_tokenizer()), CONFIG, 0)


def test_what_is_saved_is_the_merged_student_and_peft_reads_its_adapter_alike(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = lora_config(tmp_path / "run", **HELD_OUT)
    run(config)
    assert losses(config)[-1] < losses(config)[0]
    folder = config.run_path / "checkpoints" / "step-000005"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "init")
    theirs = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    ours = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        adapted, merged = theirs(ids).logits, ours(ids).logits
        untrained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "init").eval()(ids).logits
    assert float((adapted - merged).abs().max()) < 1e-5
    assert float((untrained - merged).abs().max()) > 1e-2


def test_taken_up_again_adapters_go_on_exactly_and_only_on_their_own_base(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    whole = lora_config(tmp_path / "whole")
    run(whole)
    cut = lora_config(tmp_path / "cut")
    with pytest.raises(RunInterrupted):
        run(cut, Watcher(stop_at=3))
    kept = load_policy(tmp_path / "cut" / "init")
    with torch.no_grad():
        next(kept.parameters()).mul_(1.01)
    save_policy(kept, tmp_path / "cut" / "init")
    with pytest.raises(CheckpointError, match="adapters are not for these first weights"):
        run(cut)
    save_policy(load_policy(tmp_path / "whole" / "init"), tmp_path / "cut" / "init")
    run(cut)
    assert_same(cut, whole)
