"""The learner in 2 and 3 processes against one; the checks themselves are in learner_worker.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.grpo.learner_worker import CHECKS, SCENARIOS, worlds_of

CASES = [(world, name) for world in (2, 3) for name in (*SCENARIOS, *CHECKS) if world in worlds_of(name)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes left their results: first 2 of them, then 3, which take up what the 2 wrote."""
    folder = tmp_path_factory.mktemp("learner")
    for world in (2, 3):
        processes = []
        for rank in range(world):
            command = [sys.executable, "-m", "tests.grpo.learner_worker", str(rank), str(world), str(folder)]
            with (folder / f"{world}-{rank}.log").open("w") as log:
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=os.environ | {"OMP_NUM_THREADS": "1"},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            for process in processes:
                process.wait(timeout=600)
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
