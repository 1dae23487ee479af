"""Checkpoints: bit-exact round trips, damage that is named, and folders that are written whole or not at all."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import signal
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from policy.checkpoint import (
    CheckpointError,
    atomic_folder,
    hf_state_dict,
    load_hf_state_dict,
    load_policy,
    read_config,
    save_policy,
)
from policy.config import PolicyConfig
from policy.deepseek import DeepseekPolicy
from tests.policy.builders import TINY, packed_logits, random_sequences, tiny_policy

CONFIGS = {
    "plain": TINY,
    "q_lora_groups": replace(TINY, q_lora_rank=20, n_group=4, topk_group=2, eos_token_id=0, pad_token_id=1),
    "tied": replace(TINY, tie_word_embeddings=True),
}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The checkpoint of `tiny_policy()`."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_policy(tiny_policy(), folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_round_trip_is_bit_exact(config: PolicyConfig, tmp_path: Path) -> None:
    model = tiny_policy(config)
    save_policy(model, tmp_path)
    loaded = load_policy(tmp_path)
    assert loaded.config == config
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    sequences = random_sequences([8, 3])
    assert torch.equal(packed_logits(model, sequences), packed_logits(loaded, sequences))


def test_the_file_has_the_released_names_one_entry_per_expert(saved: Path) -> None:
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == hf_state_dict(tiny_policy()).keys()
    stem = "model.layers.1.mlp"
    for expert in range(TINY.n_routed_experts):
        assert {f"{stem}.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")} <= names
    assert f"{stem}.gate.e_score_correction_bias" in names
    assert "model.layers.0.self_attn.kv_a_proj_with_mqa.weight" in names
    assert not any("gate_up_proj" in name or name.endswith("load") for name in names)


def test_experts_are_views_of_the_stacked_weights() -> None:
    model = tiny_policy()
    named = hf_state_dict(model)
    stacked = model.get_parameter("model.layers.2.mlp.experts.gate_up_proj")
    width = TINY.moe_intermediate_size
    assert torch.equal(named["model.layers.2.mlp.experts.5.gate_proj.weight"], stacked[5, :width])
    assert torch.equal(named["model.layers.2.mlp.experts.5.up_proj.weight"], stacked[5, width:])
    with torch.no_grad():
        stacked.zero_()
    assert named["model.layers.2.mlp.experts.5.up_proj.weight"].abs().max() == 0


def test_the_config_says_what_vllm_needs(saved: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    assert values["topk_method"] == "noaux_tc"
    assert values["scoring_func"] == "sigmoid"
    assert values["model_type"] == "deepseek_v3"
    assert values["architectures"] == ["DeepseekV3ForCausalLM"]
    assert values["dtype"] == "float32"


def test_a_checkpoint_that_transformers_wrote_loads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = replace(TINY, q_lora_rank=20, rope_theta=500.0, eos_token_id=3, routed_scaling_factor=1.5)
    reference = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**config.to_hf_dict())).eval()
    reference.save_pretrained(tmp_path)
    model = load_policy(tmp_path)
    assert model.config == config
    (sequence,) = random_sequences([12])
    with torch.no_grad():
        gap = packed_logits(model, [sequence]) - reference(torch.tensor([sequence])).logits[0]
    assert gap.abs().max() < 1e-5


def test_bfloat16_keeps_the_biases_and_loads_in_fp32(saved: Path) -> None:
    half = load_policy(saved, torch.bfloat16)
    full = tiny_policy()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for name, buffer in half.named_buffers():
        assert buffer.dtype == torch.float32, name
        assert torch.equal(buffer, full.get_buffer(name)), name
    again = saved.with_name("half")
    again.mkdir()
    save_policy(half, again)
    assert json.loads((again / "config.json").read_text())["dtype"] == "bfloat16"
    for name, value in load_policy(again).named_parameters():
        assert torch.equal(value, full.get_parameter(name).to(torch.bfloat16).float()), name


def test_several_files_with_an_index_are_read(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: weights[name] for name in own}, saved / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = hf_state_dict(load_policy(saved))
    assert all(torch.equal(loaded[name], weights[name]) for name in names)
    (saved / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks b\.safetensors"):
        load_policy(saved)


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}'])
def test_a_broken_index_is_named(saved: Path, text: str) -> None:
    (saved / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load_policy(saved)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.4, 0.999])
def test_a_truncated_file_is_named(saved: Path, share: float) -> None:
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut off"):
        load_policy(saved)


def test_missing_unknown_and_misshapen_tensors_are_named(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["model.layers.9.extra.weight"] = weights.pop("model.layers.1.mlp.experts.3.up_proj.weight")
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].contiguous()
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_policy(saved)
    message = str(caught.value)
    assert str(saved) in message
    assert "in 3 places" in message
    assert "missing model.layers.1.mlp.experts.3.up_proj.weight" in message
    assert "unknown model.layers.9.extra.weight" in message
    assert "model.norm.weight is [47], the config says [48]" in message


def test_weights_that_do_not_fit_change_nothing() -> None:
    model, fresh = tiny_policy(), tiny_policy()
    weights = {name: value + 1 for name, value in hf_state_dict(model).items()}
    del weights["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"the update does not fit.*missing lm_head\.weight"):
        load_hf_state_dict(model, weights, "the update")
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())


def test_another_architecture_is_named(saved: Path) -> None:
    edit_config(saved, model_type="qwen2")
    with pytest.raises(CheckpointError, match=r"config\.json.*model_type='qwen2'.*deepseek_v3"):
        load_policy(saved)


def test_a_folder_without_config_is_named(saved: Path) -> None:
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint is not a checkpoint: it has no config\.json"):
        load_policy(saved)
    with pytest.raises(CheckpointError, match="nowhere is not a checkpoint"):
        load_policy(saved / "nowhere")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe\x00", b""])
def test_a_config_that_is_no_json_object_is_named(saved: Path, content: bytes) -> None:
    (saved / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(saved)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_appears_when_its_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("1")
        assert not target.exists()
    assert contents(tmp_path) == {"deep/folder/a": b"1"}
    with atomic_folder(target) as temporary:
        (temporary / "b").write_text("2")
        assert contents(target) == {"a": b"1"}
    assert contents(tmp_path) == {"deep/folder/b": b"2"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ZeroDivisionError("no"), ZeroDivisionError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("a bug, not a full disk"), RuntimeError),
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError),
    ],
)
def test_an_exception_leaves_the_earlier_folder_whole(
    saved: Path, raised: BaseException, expected: type[BaseException]
) -> None:
    before = contents(saved)
    with pytest.raises(expected) as caught, atomic_folder(saved) as temporary:
        (temporary / "config.json").write_text("half")
        raise raised
    assert contents(saved) == before
    assert list(saved.parent.iterdir()) == [saved]
    assert (type(caught.value) is CheckpointError) == (expected is CheckpointError)
    if expected is CheckpointError:
        assert "No space left on device" in str(caught.value)
        assert str(saved) in str(caught.value)


def test_a_disk_that_fills_up_while_weights_are_written(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(saved)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("policy.checkpoint.save_torch_state_dict", full)
    with pytest.raises(CheckpointError, match="No space left on device"), atomic_folder(saved) as temporary:
        save_policy(tiny_policy(seed=1), temporary)
    assert contents(saved) == before
    assert list(saved.parent.iterdir()) == [saved]


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """A real failure of the operating system, in the middle of a file, for every writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("writer", ["safetensors", "torch.save"])
def test_a_write_that_the_system_refuses_is_a_clear_error(saved: Path, writer: str) -> None:
    before = contents(saved)
    model = tiny_policy(seed=1)
    with no_file_above(40_000), pytest.raises(CheckpointError, match=r"writing .*checkpoint failed"):  # noqa: SIM117
        with atomic_folder(saved) as temporary:
            if writer == "safetensors":
                save_policy(model, temporary)
            else:
                torch.save(model.state_dict(), temporary / "learner.pt")
    assert contents(saved) == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_failed_replacement_puts_the_earlier_folder_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = contents(saved), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match="Input/output error"), atomic_folder(saved) as temporary:
        (temporary / "config.json").write_text("new")
    assert contents(saved) == before
    assert list(saved.parent.iterdir()) == [saved]


def test_too_little_space_is_refused_before_anything_is_written(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**30, 2**30 - 2**20, 2**20))
    with pytest.raises(CheckpointError, match=r"no space for .*checkpoint: 3 MiB needed, 1 MiB free"):  # noqa: SIM117
        with atomic_folder(saved, needed_bytes=3 * 2**20):
            pytest.fail("the block must not run")
    assert list(saved.parent.iterdir()) == [saved]
    with atomic_folder(saved, needed_bytes=2**20) as temporary:
        (temporary / "a").touch()
    assert contents(saved) == {"a": b""}


def test_what_is_saved_is_a_copy_of_the_model(saved: Path) -> None:
    model: DeepseekPolicy = load_policy(saved)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(load_policy(saved).lm_head.weight, tiny_policy().lm_head.weight)
