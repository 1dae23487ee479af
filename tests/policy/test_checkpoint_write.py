"""What is written: files that the safetensors library reads, planned by size, fetched one tensor at a time."""

from __future__ import annotations

import json
import shutil
import weakref
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from policy.checkpoint import CheckpointError, save_policy
from policy.checkpoint_write import Source, write_weights
from tests.policy.builders import tiny_policy

INDEX = "model.safetensors.index.json"
Usage = namedtuple("Usage", "total used free")


def source(name: str, value: Tensor, keep_dtype: bool = False) -> Source:
    return Source(name, tuple(value.shape), value.dtype, lambda: value, keep_dtype)


def written(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


shapes = st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=8)
types = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@settings(deadline=None, derandomize=True, max_examples=40)
@given(shapes, st.data(), st.integers(1, 3000))
def test_every_tensor_comes_back_and_no_file_is_too_large(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], data: st.DataObject, limit: int
) -> None:
    folder = tmp_path_factory.mktemp("written")
    tensors = {f"t{i}": torch.randn(shape).to(data.draw(types)) for i, shape in enumerate(shapes)}
    write_weights([source(name, value) for name, value in tensors.items()], folder, max_shard_bytes=limit)
    back = written(folder)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value)
    for file in folder.glob("*.safetensors"):
        sizes = [value.nbytes for value in load_file(file).values()]
        assert sum(sizes) <= limit or len(sizes) == 1
    shutil.rmtree(folder)


def test_the_index_is_the_one_that_hugging_face_writes(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    write_weights([source(name, value) for name, value in tensors.items()], tmp_path, max_shard_bytes=80)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 200
    files = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    assert [index["weight_map"][f"t{i}"] for i in range(5)] == [files[0], files[0], files[1], files[1], files[2]]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*files, INDEX])
    with safe_open(tmp_path / files[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    write_weights([source("a", torch.ones(3))], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_views_and_transposed_tensors_are_written_as_they_read(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(2, 3, 4)
    tensors = {"view": whole[1], "transposed": whole[0].T, "strided": whole[:, ::2, 1], "scalar": torch.tensor(7.0)}
    write_weights([source(name, value) for name, value in tensors.items()], tmp_path)
    back = written(tmp_path)
    assert all(torch.equal(back[name], value) for name, value in tensors.items())


def test_long_tensors_are_written_piece_by_piece(tmp_path: Path) -> None:
    """More than one piece, the last of them not whole, in every type."""
    tall = torch.randn(128 * 9 + 5, 1300, generator=torch.Generator().manual_seed(0))
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype in ("float32", "bfloat16", "float8_e4m3fn"):
        write_weights([source(name, tall), source("after", torch.ones(3))], tmp_path, dtype)
        back = written(tmp_path)
        value = back[name].float()
        if dtype == "float8_e4m3fn":
            scale = back[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            value = value * scale[: tall.shape[0], : tall.shape[1]]
            assert ((value - tall).abs() <= tall.abs() / 16 + scale[: tall.shape[0], : tall.shape[1]] / 1023).all()
        else:
            assert torch.equal(value, tall.to(getattr(torch, dtype)).float())
        assert back["after"].tolist() == [1, 1, 1]


def test_scales_lie_beside_their_weights(tmp_path: Path) -> None:
    save_policy(tiny_policy(), tmp_path, dtype="float8_e4m3fn", max_shard_bytes=3_000)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    scales = [name for name in weight_map if name.endswith("_scale_inv")]
    assert len(scales) > 50
    assert all(weight_map[name] == weight_map[name.removesuffix("_scale_inv")] for name in scales)


def test_values_are_aligned(tmp_path: Path) -> None:
    write_weights(
        [source("a", torch.ones(1).bfloat16()), source("b", torch.ones(3)), source("c", torch.ones(1))], tmp_path
    )
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert {name: header[name]["data_offsets"] for name in "abc"} == {"a": [16, 18], "b": [0, 12], "c": [12, 16]}


def test_one_tensor_is_fetched_after_the_other_and_every_process_fetches_all(tmp_path: Path) -> None:
    """A gather over processes needs the same order everywhere, and room for one tensor at a time."""
    events: list[str] = []

    def fetching(name: str) -> Source:
        def fetch() -> Tensor:
            value = torch.ones(10)
            events.append(name)
            weakref.finalize(value, events.append, f"{name} freed")
            return value

        return Source(name, (10,), torch.float32, fetch)

    for folder in (tmp_path, None):
        events.clear()
        write_weights([fetching(name) for name in "cab"], folder, max_shard_bytes=80)
        assert events == ["c", "c freed", "a", "a freed", "b", "b freed"]


def test_too_little_space_is_refused_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**30, 2**30 - 2**20, 2**20))

    def fetch() -> Tensor:
        pytest.fail("nothing may be fetched")

    with pytest.raises(CheckpointError, match=r"no space for .*: 2 MiB needed, 1 MiB free"):
        write_weights([Source("a", (2**19,), torch.float32, fetch)], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_the_caller_are_named(tmp_path: Path) -> None:
    one = source("a", torch.ones(3))
    with pytest.raises(ValueError, match="can be written as float32, bfloat16, float8_e4m3fn, not 'int8'"):
        write_weights([one], tmp_path, "int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a given twice"):
        write_weights([one, one], tmp_path)
    with pytest.raises(ValueError, match=r"a came as \[3\], not \[4\]"):
        write_weights([Source("a", (4,), torch.float32, lambda: torch.ones(3))], tmp_path)
