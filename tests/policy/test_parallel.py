"""Policies spread over 2 and 4 processes against one process; the checks themselves are in parallel_worker.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from policy.checkpoint import hf_state_dict, load_policy
from policy.parallel import ParallelismError, clip_grad_norm, global_grad_norm, parallelize
from policy.sharded_checkpoint import load_optimizer
from policy.sharding import gathered_weights
from tests.policy.builders import TINY, tiny_policy
from tests.policy.parallel_worker import CHECKS, V3, LoneTrainer, close

CASES = [(world, name) for name, (worlds, _) in CHECKS.items() for world in worlds]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes left results and checkpoints: first 2 of them, then 4, which take up what the 2 wrote."""
    folder = tmp_path_factory.mktemp("parallel")
    for world in (2, 4):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.policy.parallel_worker"]
        processes = []
        for rank in range(world):
            log = (folder / f"{world}-{rank}.log").open("w")
            arguments = [str(rank), str(world), str(folder)]
            processes.append(
                subprocess.Popen(command + arguments, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
            log.close()
        try:
            for process in processes:
                process.wait(timeout=300)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return folder


@pytest.mark.parametrize(("world", "name"), CASES, ids=[f"{name}-{world}" for world, name in CASES])
def test_of_processes(folder: Path, world: int, name: str):
    for rank in range(world):
        path = folder / f"{world}-{rank}.json"
        results = json.loads(path.read_text()) if path.is_file() else {}
        log = (folder / f"{world}-{rank}.log").read_text()
        assert name in results, f"rank {rank} did not come to it: {list(results.items())[-1:]} {log[-2000:]}"
        assert results[name] is None, results[name]


def test_checkpoint_of_two_ranks_goes_on_in_one(folder: Path):
    model = load_policy(folder / "checkpoint")
    before, after = torch.load(folder / "weights.pt")
    own = hf_state_dict(model)
    assert own.keys() == before.keys()
    assert all(torch.equal(own[name], weight) for name, weight in before.items())
    assert (folder / "checkpoint" / "model.safetensors.index.json").is_file()
    trainer = LoneTrainer(model)
    load_optimizer(model, trainer.muon, folder / "checkpoint" / "muon")
    load_optimizer(model, trainer.adamw, folder / "checkpoint" / "adamw")
    trainer.step(1)
    for name, weight in hf_state_dict(model).items():
        close(weight, after[name], name)


@pytest.mark.parametrize("config", [TINY, V3])
def test_weights_of_one_process_are_those_of_hf_state_dict(config):
    model = tiny_policy(config)
    expected = hf_state_dict(model)
    gathered = list(gathered_weights(model))
    assert [name for name, _ in gathered] == list(expected)
    assert all(weight is not None and torch.equal(weight, expected[name]) for name, weight in gathered)


def test_norm_and_clipping_in_one_process_are_torch_s():
    model, other = tiny_policy(), tiny_policy()
    generator = torch.Generator().manual_seed(0)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        ours.grad = torch.randn(ours.shape, generator=generator)
        theirs.grad = ours.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
    close(clip_grad_norm(model.parameters(), 0.5), norm)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        close(ours.grad, theirs.grad)
    close(global_grad_norm(model.parameters()), torch.tensor(0.5))


def test_without_processes_nothing_is_spread():
    with pytest.raises(ParallelismError, match="torchrun"):
        parallelize(tiny_policy())
