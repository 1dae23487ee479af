"""Exported checkpoints: what transformers loads computes what the policy computes, also while a run goes on."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from policy.atomic import CheckpointError
from policy.checkpoint import hf_state_dict, load_policy, save_policy
from policy.deepseek import DeepseekPolicy
from policy.dense import DensePolicy
from policy.dense_config import DenseConfig
from policy.fp8_format import QUANTIZATION_CONFIG, dequantise, quantise
from policy.interface import Policy
from rollout.checkpoints import CheckpointConfig, Checkpoints
from rollout.errors import UserError
from rollout.tokenizer import train_tokenizer
from scripts import export_command
from scripts.cli import app
from scripts.export_command import run_export
from tests.policy.builders import TINY, pack, random_sequences, tiny_policy
from tests.policy.dense_builders import SHAPES, randomise

VOCAB = 320
SEQUENCES = random_sequences([7, 12], vocab=VOCAB)
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["1 + 1 = 2", "what is 3 * 4?"] * 20, VOCAB, CHAT)


def deepseek() -> DeepseekPolicy:
    return tiny_policy(replace(TINY, vocab_size=VOCAB))


def dense() -> DensePolicy:
    model = DensePolicy(DenseConfig.of_shape({**SHAPES["qwen2"], "vocab_size": VOCAB}))
    randomise(model, 0)
    return model.eval()


def writer(model: Policy, tokenizer: Any) -> Callable[[Path], None]:
    """Writes what a run writes: the policy, its tokenizer, and the learner's state."""

    def write(folder: Path) -> None:
        save_policy(model, folder, max_shard_bytes=40_000)
        tokenizer.save_pretrained(folder)
        torch.save({"moments": torch.zeros(3)}, folder / "learner.pt")
        (folder / "run.json").write_text("{}")

    return write


def run_with(model: Policy, tokenizer: Any, run: Path, steps: tuple[int, ...] = (1,)) -> Path:
    """A run folder with checkpoints; the newest one's path."""
    checkpoints = Checkpoints(run / "checkpoints", CheckpointConfig(keep_last=10), pytest.fail)
    for step in steps:
        checkpoints.save(step, writer(model, tokenizer), background=False)
    (run / "config.toml").write_text("")
    return run / "checkpoints" / f"step-{steps[-1]:06d}"


@torch.no_grad()
def logits_of(model: Policy, sequence: list[int]) -> torch.Tensor:
    return model.lm_head(model(*pack([sequence])).hidden)


@pytest.mark.parametrize("build", [deepseek, dense])
def test_transformers_computes_the_same_and_generates(
    build: Callable[[], Policy], tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, out = build(), tmp_path / "out"
    newest = run_with(model, tokenizer, tmp_path / "run", (1, 2))
    assert run_export(tmp_path / "run", out, "float32") == newest
    assert {path.name for path in out.iterdir() if "model" not in path.name} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    for sequence in SEQUENCES:
        with torch.no_grad():
            logits = theirs(torch.tensor([sequence])).logits[0]
        assert (logits - logits_of(model, sequence)).abs().max() < 1e-4
    assert theirs.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert theirs.generation_config.pad_token_id == tokenizer.pad_token_id
    assert AutoTokenizer.from_pretrained(out).chat_template == CHAT
    again = AutoTokenizer.from_pretrained(out)("what is 1 + 1?").input_ids
    assert again == tokenizer("what is 1 + 1?").input_ids
    generated = theirs.generate(torch.tensor([again]), max_new_tokens=4, do_sample=False)[0, len(again) :].tolist()
    assert generated[0] == int(logits_of(model, again)[-1].argmax())


@pytest.mark.parametrize("build", [deepseek, dense])
def test_bfloat16_is_the_nearest_of_each_weight(build: Callable[[], Policy], tokenizer: Any, tmp_path: Path) -> None:
    model, out = build(), tmp_path / "out"
    run_export(run_with(model, tokenizer, tmp_path / "run"), out, "bfloat16")
    written = load_file(out / "model.safetensors")
    for name, value in hf_state_dict(model).items():
        wanted = value if name.endswith("e_score_correction_bias") else value.bfloat16()
        assert written[name].dtype == wanted.dtype
        assert torch.equal(written[name], wanted)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_fp8_is_the_released_format_and_exports_back(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_policy(replace(TINY, vocab_size=VOCAB, num_nextn_predict_layers=1))
    run_export(run_with(model, tokenizer, tmp_path / "run"), tmp_path / "fp8", "fp8")
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"] == QUANTIZATION_CONFIG
    run_export(tmp_path / "fp8", tmp_path / "back", "float32")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    name = "model.layers.1.self_attn.o_proj.weight"
    quantised, scale = quantise(hf_state_dict(model)[name])
    for folder in ("fp8", "back"):
        loaded = hf_state_dict(load_policy(tmp_path / folder))
        assert torch.equal(loaded[name], dequantise(quantised, scale))
        assert torch.equal(loaded["lm_head.weight"], hf_state_dict(model)["lm_head.weight"].bfloat16().float())


def test_a_generation_config_of_the_checkpoint_is_kept(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_policy(dense(), tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.6}')
    run_export(tmp_path / "base", tmp_path / "out", "float32")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"temperature": 0.6}


def test_a_damaged_checkpoint_is_not_exported(tokenizer: Any, tmp_path: Path) -> None:
    checkpoint = run_with(deepseek(), tokenizer, tmp_path / "run")
    file = sorted(checkpoint.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"damaged: the content of {file.name}"):
        run_export(tmp_path / "run", tmp_path / "out", "float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_what_was_written_wrongly_never_appears(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with(deepseek(), tokenizer, tmp_path / "run")
    real = export_command.write_weights

    def wrong(sources: Any, folder: Path, dtype: Any) -> None:
        sources = [replace(s, fetch=lambda s=s: s.fetch() + 1) if s.name == "lm_head.weight" else s for s in sources]
        real(sources, folder, dtype)

    monkeypatch.setattr(export_command, "write_weights", wrong)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight was not written as it should be"):
        run_export(tmp_path / "run", tmp_path / "out", "bfloat16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_checkpoint_removed_meanwhile_gives_way_to_the_newest(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_with(deepseek(), tokenizer, tmp_path / "run")
    model, real = deepseek(), export_command.read_headers
    with torch.no_grad():
        model.lm_head.weight.mul_(2)

    def removing(folder: Path) -> Any:
        if folder == first:
            run_with(model, tokenizer, tmp_path / "run", (2,))
            shutil.rmtree(first)
        return real(folder)

    monkeypatch.setattr(export_command, "read_headers", removing)
    assert run_export(tmp_path / "run", tmp_path / "out", "float32").name == "step-000002"
    assert torch.equal(load_policy(tmp_path / "out").lm_head.weight, model.lm_head.weight)
    named = tmp_path / "run" / "checkpoints" / "step-000002"
    first = named
    with pytest.raises(CheckpointError, match="was removed by its run while it was read"):
        run_export(named, tmp_path / "other", "float32")
    assert not (tmp_path / "other").exists()


def test_every_export_is_of_one_step_while_the_run_saves_and_removes(tokenizer: Any, tmp_path: Path) -> None:
    model, stop = deepseek(), threading.Event()
    run_with(model, tokenizer, tmp_path / "run", (0,))

    def train() -> None:
        checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig(keep_last=1), pytest.fail)
        for step in range(1, 1000):
            with torch.no_grad():
                model.lm_head.weight.fill_(step)
                model.model.embed_tokens.weight.fill_(step)
            checkpoints.save(step, writer(model, tokenizer), background=False)
            if stop.wait(0.05):
                return

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for i in range(4):
            source = run_export(tmp_path / "run", tmp_path / f"out{i}", "bfloat16")
            step = int(source.name.removeprefix("step-"))
            weights = load_file(tmp_path / f"out{i}" / "model.safetensors")
            if step:
                for name in ("lm_head.weight", "model.embed_tokens.weight"):
                    assert weights[name].unique().tolist() == [torch.tensor(float(step)).bfloat16().item()]
    finally:
        stop.set()
        thread.join()


def test_what_can_not_be_exported_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="neither a run"):
        run_export(tmp_path / "run", tmp_path / "out", "float32")
    (tmp_path / "run" / "config.toml").write_text("")
    with pytest.raises(UserError, match="no checkpoint yet"):
        run_export(tmp_path / "run", tmp_path / "out", "float32")
    with pytest.raises(UserError, match="is no folder"):
        run_export(tmp_path / "nowhere", tmp_path / "out", "float32")
    with pytest.raises(UserError, match="one of float32, bfloat16, fp8, not int4"):
        run_export(tmp_path / "run", tmp_path / "out", "int4")
    with pytest.raises(UserError, match="is there already"):
        run_export(tmp_path / "run", tmp_path, "float32")
    save_policy(deepseek(), tmp_path / "run")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        run_export(tmp_path / "run", tmp_path / "out", "float32")


def test_the_command_says_what_it_exported(tokenizer: Any, tmp_path: Path) -> None:
    checkpoint = run_with(deepseek(), tokenizer, tmp_path / "run")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    assert f"{checkpoint} exported to {tmp_path / 'out'} (bfloat16)" in result.output
    again = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert again.exit_code == 2
    assert "is there already" in again.output
