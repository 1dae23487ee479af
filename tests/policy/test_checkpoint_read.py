"""What a checkpoint is refused for: damage, mixtures and misfits, by name and before anything is copied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from policy.checkpoint import CheckpointError, hf_state_dict, load_policy, read_config, save_policy
from policy.checkpoint_read import Target, load_weights, read_headers
from policy.fp8_format import dequantise, quantise
from tests.policy.builders import tiny_policy

INDEX = "model.safetensors.index.json"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The checkpoint of `tiny_policy()`."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_policy(tiny_policy(), folder)
    return folder


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


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe\x00", b""])
def test_a_config_that_is_no_json_object_is_named(saved: Path, content: bytes) -> None:
    (saved / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(saved)


def test_a_folder_without_config_is_named(saved: Path) -> None:
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint is not a checkpoint: it has no config\.json"):
        load_policy(saved)
    with pytest.raises(CheckpointError, match="nowhere is not a checkpoint"):
        load_policy(saved / "nowhere")


def sharded(folder: Path, seed: int = 0) -> Path:
    """The checkpoint of `tiny_policy()` in several files."""
    folder.mkdir()
    save_policy(tiny_policy(seed=seed), folder, max_shard_bytes=30_000)
    return folder


def edit_file(path: Path, change: Any) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def refusal(folder: Path) -> str:
    """What loading says, and a proof that the headers alone are enough to say it."""
    targets = [Target(n, tuple(t.shape), t) for n, t in hf_state_dict(tiny_policy(seed=5)).items()]
    before = [target.into.clone() for target in targets if target.into is not None]
    with pytest.raises(CheckpointError) as caught:
        load_weights(folder, targets)
    assert all(torch.equal(t.into, b) for t, b in zip(targets, before, strict=True) if t.into is not None)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_the_index_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    first, second = sharded(tmp_path / "first"), tmp_path / "second"
    second.mkdir()
    save_policy(tiny_policy(), second, max_shard_bytes=60_000)
    weight_map = json.loads((second / INDEX).read_text())["weight_map"]
    files = {file: next(iter(first.glob("*.safetensors"))).name for file in set(weight_map.values())}
    renamed = {name: files[file] for name, file in weight_map.items()}
    (first / INDEX).write_text(json.dumps({"weight_map": renamed}))
    assert "mixes files of different checkpoints" in refusal(first)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "first")
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    assert weight_map["model.norm.weight"] != weight_map["model.embed_tokens.weight"]
    other = weight_map["model.embed_tokens.weight"]
    edit_file(folder / other, lambda weights: weights.update({"model.norm.weight": torch.ones(48)}))
    message = refusal(folder)
    assert f"{other} holds model.norm.weight, which the index puts in {weight_map['model.norm.weight']}" in message


def test_a_tensor_that_the_index_does_not_know_and_one_that_is_gone_are_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "first")
    file = json.loads((folder / INDEX).read_text())["weight_map"]["model.norm.weight"]
    edit_file(folder / file, lambda weights: weights.update(extra=weights.pop("model.norm.weight")))
    message = refusal(folder)
    assert "in 2 places" in message
    assert f"{file} lacks model.norm.weight" in message
    assert f"{file} holds extra, which the index puts nowhere" in message


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", 3])
def test_an_index_reaches_into_no_other_folder(tmp_path: Path, place: Any) -> None:
    folder = sharded(tmp_path / "first")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": place}}))
    assert f"puts model.norm.weight in {place!r}" in refusal(folder)


def test_an_empty_index_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "first")
    (folder / INDEX).write_text('{"weight_map": {}}')
    assert "lists no tensor" in refusal(folder)


def test_the_last_of_several_files_cut_off_by_a_byte_changes_nothing(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "first")
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    assert f"{last.name} is damaged or cut off" in refusal(folder)


def test_a_long_list_of_problems_is_cut(saved: Path) -> None:
    edit_file(saved / "model.safetensors", lambda weights: [weights.pop(name) for name in sorted(weights)[:20]])
    message = refusal(saved)
    assert "in 20 places" in message
    assert message.count("missing") == 8
    assert message.endswith("and 12 more")


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """An FP8 checkpoint."""
    folder = tmp_path / "fp8"
    folder.mkdir()
    save_policy(tiny_policy(), folder, dtype="float8_e4m3fn")
    return folder


NAME = "model.layers.0.mlp.up_proj.weight"
Weights = dict[str, Tensor]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop(NAME + "_scale_inv"), f"{NAME} is [64, 48] in FP8 without its scales, {NAME}_scale_inv"),
        (lambda w: w.update({NAME + "_scale_inv": torch.ones(2, 1)}), "_scale_inv is F32 [2, 1], not F32 [1, 1]"),
        (lambda w: w.update({NAME + "_scale_inv": torch.ones(1, 1).bfloat16()}), "_scale_inv is BF16 [1, 1], not F32"),
        (lambda w: w.update({NAME: torch.ones(64, 48).bfloat16()}), f"unknown {NAME}_scale_inv"),
        (lambda w: w.update({NAME: torch.ones(64, 48, dtype=torch.int8)}), f"unknown {NAME}_scale_inv"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}),
            "model.norm.weight is stored as I8",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)}),
            "model.norm.weight is [48] in FP8 without its scales",
        ),
    ],
)
def test_fp8_that_lacks_its_scales_is_refused(fp8: Path, change: Any, named: str) -> None:
    edit_file(fp8 / "model.safetensors", change)
    assert named in refusal(fp8)


@pytest.mark.parametrize("where", [NAME, NAME + "_scale_inv"])
def test_fp8_that_is_not_finite_is_named(fp8: Path, where: str) -> None:
    def spoil(weights: Weights) -> None:
        if where == NAME:
            weights[NAME].view(torch.uint8)[7, 7] = 0x7F
        else:
            weights[where].fill_(float("inf"))

    edit_file(fp8 / "model.safetensors", spoil)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds NaN or infinity in FP8"):
        load_policy(fp8)


def test_scales_may_lie_in_another_file(fp8: Path) -> None:
    """As they do in the release, for the last weight of a file."""
    expected = hf_state_dict(load_policy(fp8))
    weights = load_file(fp8 / "model.safetensors")
    (fp8 / "model.safetensors").unlink()
    scales = {name: weights.pop(name) for name in list(weights) if name.endswith("_scale_inv")}
    save_file(weights, fp8 / "a.safetensors")
    save_file(scales, fp8 / "b.safetensors")
    weight_map = dict.fromkeys(weights, "a.safetensors") | dict.fromkeys(scales, "b.safetensors")
    (fp8 / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    loaded = hf_state_dict(load_policy(fp8))
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_types_may_be_mixed(saved: Path) -> None:
    expected = load_file(saved / "model.safetensors")

    def mix(weights: Weights) -> None:
        for i, name in enumerate(sorted(weights)):
            weights[name] = weights[name].to([torch.float64, torch.bfloat16, torch.float16, torch.float32][i % 4])
            expected[name] = weights[name].float()

    edit_file(saved / "model.safetensors", mix)
    loaded = hf_state_dict(load_policy(saved))
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_headers_say_where_what_lies(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "first")
    stored = read_headers(folder)
    assert {name: entry.file for name, entry in stored.items()} == json.loads((folder / INDEX).read_text())[
        "weight_map"
    ]
    assert stored["model.layers.0.mlp.up_proj.weight"].shape == (64, 48)
    assert stored["model.norm.weight"].dtype == "F32"


def test_each_process_can_take_rows_of_its_own(tmp_path: Path) -> None:
    """Two targets of a name, one after the other, are two processes here: FP8 blocks lie across the cut."""
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    quantised, scale = quantise(weight)
    vector = torch.arange(300.0)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({name: quantised, name + "_scale_inv": scale, "plain": vector}, tmp_path / "model.safetensors")
    for first, last in ((0, 100), (100, 300), (128, 129), (0, 300), (7, 7)):
        rows, part = torch.zeros(last - first, 200), torch.zeros(last - first)
        load_weights(tmp_path, [Target(name, (300, 200), rows, first), Target("plain", (300,), part, first)])
        assert torch.equal(rows, dequantise(quantised, scale)[first:last])
        assert torch.equal(part, vector[first:last])
    load_weights(tmp_path, [Target(name, (300, 200), None), Target("plain", (300,), None)])
    with pytest.raises(CheckpointError, match=r"is \[300, 200\], the config says \[300, 201\]"):
        load_weights(tmp_path, [Target(name, (300, 201), None), Target("plain", (300,), None)])
