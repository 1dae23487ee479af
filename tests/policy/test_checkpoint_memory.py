"""Host memory of saving and loading: a stream, whatever the size of the model and the type on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
# Peaks are those of the operating system, in a process of its own: resident pages, mapped files included. What is
# loaded once (code of torch) a small policy loads first.
PROGRAM = """
import ctypes, json, sys
from dataclasses import replace
from pathlib import Path
import torch
from policy.checkpoint import load_policy, save_policy
from tests.policy.builders import TINY, tiny_policy

def memory(field):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024

def peak_of(work):
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what was freed before would hide what is needed now
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = work()
    return result, memory("VmHWM") - before

big = replace(TINY, hidden_size=512, moe_intermediate_size=512, n_routed_experts=32, num_nextn_predict_layers=1)
peaks = {}
for config in (TINY, big):
    model = tiny_policy(config)
    for stored, loaded, mib in (("float32", "float32", 64), ("bfloat16", "float32", 64), ("float8_e4m3fn", "bfloat16", 32)):
        folder = Path(sys.argv[1], f"{stored}-{config.hidden_size}")
        folder.mkdir()
        _, saving = peak_of(lambda: save_policy(model, folder, stored, mib * 2**20))
        again, loading = peak_of(lambda: load_policy(folder, getattr(torch, loaded)))
        size = sum(t.numel() * t.element_size() for t in again.parameters())
        shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
        peaks[stored] = {"saving": saving, "loading": loading - size, "model": size, "shard": shard}
        del again
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux's /proc")
def test_the_peak_beyond_the_model_is_under_1_2_of_the_largest_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    assert set(peaks) == {"float32", "bfloat16", "float8_e4m3fn"}
    for stored, peak in peaks.items():
        assert peak["shard"] > 30 * 2**20
        assert peak["model"] > 4 * peak["shard"]  # else holding all of it might pass
        assert peak["saving"] < 1.2 * peak["shard"], (stored, peaks)
        assert peak["loading"] < 1.2 * peak["shard"], (stored, peaks)
