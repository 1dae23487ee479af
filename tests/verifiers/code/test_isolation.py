"""The walls hold, nothing outlives a run, a verifier or its end, and it works for a user without rights."""

# ruff: noqa: E501  (programs, as texts)

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.verifiers.code.support import PlainTask, need_namespaces
from verifiers.code import sandbox
from verifiers.code.hostile import HONEST
from verifiers.code.isolation import describe_isolation, prove_isolation
from verifiers.code.limits import Limits
from verifiers.code_verifier import CodeVerifier

ROOT = Path(__file__).resolve().parents[3]


def test_every_attempt_to_get_out_is_held(sandbox):
    if sandbox == "limits-only" and not describe_isolation(sandbox).landlock_abi:
        pytest.skip("without Landlock, limits alone do not hide the host's files")
    broken = [f"{attempt.name}: {attempt.detail}" for attempt in prove_isolation(sandbox) if not attempt.held]
    assert broken == []


def test_description_names_what_is_in_force():
    need_namespaces()
    description = describe_isolation()
    assert description.isolation in ("namespaces", "bubblewrap")
    assert describe_isolation("limits-only").isolation == "limits-only"
    missing = describe_isolation("bubblewrap")
    assert (missing.isolation is None) == (shutil.which("bwrap") is None) or missing.detail


def test_a_proof_finds_a_hole(monkeypatch):
    """The attempts are worth something: with the host's /tmp shown inside, the secret is read."""
    need_namespaces()
    from verifiers.code import layout

    sandbox.close_all()
    place = layout.for_profile("python")
    open_place = layout.Place((*place.binds, ("/", "/host")), place.links, place.python_path, place.packages)
    monkeypatch.setattr(layout, "for_profile", lambda profile: open_place)
    source = "import os\nprint(os.path.exists('/host/proc'), os.path.exists('/host/etc/passwd'))"
    try:
        with sandbox.Session("auto") as session, session.run("program", {"source": source}, Limits()) as run:
            run.wait()
            assert run.output().split()[1] == b"True"
    finally:
        sandbox.close_all()


def test_runs_share_nothing():
    need_namespaces()
    with sandbox.Session("auto") as session:
        outputs = []
        for _ in range(2):
            source = "import os\nprint(os.listdir('/tmp'), os.getcwd())\nopen('left', 'w').close()\nos.fork() or __import__('time').sleep(9)"
            with session.run("program", {"source": source}, Limits()) as run:
                assert run.wait().exit_status == 0
                outputs.append(run.output())
        assert outputs == [b"[] /tmp\n", b"[] /tmp\n"]


def test_limits_of_a_run():
    need_namespaces()
    with sandbox.Session("auto") as session:
        source = (
            "import resource as r\nprint([r.getrlimit(x)[0] for x in (r.RLIMIT_AS, r.RLIMIT_FSIZE, r.RLIMIT_NPROC)])"
        )
        limits = Limits(memory_mb=300, file_mb=2, num_processes=7)
        with session.run("program", {"source": source}, limits) as run:
            assert run.wait().exit_status == 0
            assert run.output() == f"[{300 * 2**20}, {2 * 2**20}, 7]\n".encode()


def _running(mark):
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


def _gone(mark, seconds=20.0):
    end = time.monotonic() + seconds
    while _running(mark) and time.monotonic() < end:
        time.sleep(0.05)
    return not _running(mark)


KILLED = """
import sys, threading
from verifiers.code import sandbox
from verifiers.code.limits import Limits
choice, mark = sys.argv[1:]
source = "import os, sys, time\\nos.execv('/proc/self/exe', ['x', '-c', 'import time; print(1, flush=True); time.sleep(99)', %r])" % mark
with sandbox.Session(choice) as session, session.run("program", {"source": source}, Limits(wall_s=60)) as run:
    while not run.output(): pass
    print("running", flush=True)
    run.wait()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_verifier_that_is_killed(sandbox, how):
    mark = f"mark-{os.getpid()}-{sandbox}-{how}"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, sandbox, mark],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"running\n"
    assert len(_running(mark)) >= 2
    process.send_signal(how)
    process.wait(timeout=20)
    process.stdout.close()
    assert _gone(mark)


def test_limits_only_leaves_no_directory_behind(tmp_path):
    code = "import sys\nfrom tests.verifiers.code.support import PlainTask\nfrom verifiers.code.hostile import HONEST\n"
    code += "from verifiers.code_verifier import CodeVerifier\ns, a = HONEST['stdin']\n"
    code += "print(CodeVerifier(sandbox='limits-only')(s, PlainTask(a)).status)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    assert done.stdout.strip() == "correct"
    end = time.monotonic() + 10
    while list(tmp_path.iterdir()) and time.monotonic() < end:
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


def test_a_forked_copy_of_the_verifier_gets_servers_of_its_own():
    need_namespaces()
    source, answer = HONEST["stdin"]
    assert CodeVerifier()(source, PlainTask(answer)).status == "correct"
    pid = os.fork()
    if pid == 0:
        status = CodeVerifier()(source, PlainTask(answer)).status
        sandbox.close_all()
        os._exit(0 if status == "correct" else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert CodeVerifier()(source, PlainTask(answer)).status == "correct"


AS_NOBODY = """
import json, sys
sys.path.insert(0, sys.argv[1])
from verifiers.code.hostile import HONEST
from verifiers.code.isolation import describe_isolation, prove_isolation
from verifiers.code_verifier import CodeVerifier
import types
verdicts = {name: CodeVerifier()(s, types.SimpleNamespace(answer=a, prompt="")).status for name, (s, a) in HONEST.items()}
print(json.dumps([describe_isolation().isolation, verdicts, [a.name for a in prove_isolation() if not a.held]]))
"""


def test_it_works_for_a_user_without_rights():
    """The other tests run as whoever runs them; this one as `nobody`, if that can be tried from here."""
    need_namespaces()
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("not root, so the other tests ran without rights already")
    prefix = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    pythons = [
        sys.executable,
        *(path for path in ("/usr/bin/python3", "/usr/local/bin/python3") if os.path.exists(path)),
    ]
    probe = "import sys, os; os.stat(sys.argv[1]); sys.exit(sys.version_info < (3, 11))"
    for python in pythons:
        command = [*prefix, "env", python, "-c", probe, str(ROOT / "verifiers/registry.py")]
        if subprocess.run(command, capture_output=True, check=False, cwd="/").returncode == 0:
            break
    else:
        pytest.skip("no Python of at least 3.11, with this checkout, is readable by nobody")
    command = [*prefix, "env", "HOME=/tmp", python, "-c", AS_NOBODY, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", timeout=100)
    if "limits-only" in done.stdout + done.stderr and "correct" not in done.stdout:
        pytest.skip("users without rights get no namespaces on this machine")
    assert done.returncode == 0, done.stderr
    assert '{"stdin": "correct", "call": "correct", "asserts": "correct"}, []]' in done.stdout
