"""Which isolation is in force for programs, and proof of it: a program that tries to get out, attempt by attempt.

Whether an attempt got anywhere is decided out here wherever that can be seen from out here (was the secret printed, did
the file appear, did the listener hear a call), not by what the program says.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from verifiers.code.limits import Ending, Limits
from verifiers.code.sandbox import Choice, SandboxError, Session, available


@dataclass(frozen=True, kw_only=True)
class Description:
    """What programs run in; `isolation` is None where nothing can be had, and `detail` says what or why."""

    isolation: str | None
    detail: str
    is_seccomp: bool = False
    landlock_abi: int = 0


class Attempt(NamedTuple):
    """One attempt to get out: what was tried, whether the sandbox held, and what was seen."""

    name: str
    held: bool
    detail: str


@dataclass
class _Outside:
    """What the attempts aim at: a secret file, a path to write to, listeners, this process."""

    secret: str
    secret_path: Path
    target_path: Path
    listener: socket.socket
    abstract: socket.socket
    abstract_name: str
    mark: str

    def fill(self, source: str) -> str:
        """The attempt's source with the places filled in."""
        places = {
            "SECRET_PATH": repr(str(self.secret_path)),
            "TARGET_PATH": repr(str(self.target_path)),
            "PORT": str(self.listener.getsockname()[1]),
            "ABSTRACT": repr(self.abstract_name),
            "PID": str(os.getpid()),
            "MARK": repr(self.mark),
        }
        for name, value in places.items():
            source = source.replace(f"<{name}>", value)
        return source


def describe_isolation(choice: Choice = "auto") -> Description:
    """The isolation that programs get on this machine; it is tried out, which takes a fraction of a second once."""
    try:
        isolation = available(choice)
        with Session(choice) as session:
            facts = session.facts
    except SandboxError as exc:
        return Description(isolation=None, detail=str(exc))
    walls = {
        "namespaces": "user, mount, process, network, IPC and host-name namespaces; empty read-only root",
        "bubblewrap": "bubblewrap: its namespaces and read-only mounts",
        "limits-only": "resource limits only: the host's processes can be seen",
    }
    parts = [walls[isolation], "system-call filter" if facts["seccomp"] else "no system-call filter"]
    if isolation == "limits-only":
        parts.append(f"Landlock {facts['landlock']}" if facts["landlock"] else "no Landlock: files can be read")
    if not facts["proc"]:
        parts.append("no /proc inside")
    return Description(
        isolation=isolation, detail="; ".join(parts), is_seccomp=facts["seccomp"], landlock_abi=facts["landlock"]
    )


def prove_isolation(choice: Choice = "auto") -> list[Attempt]:
    """Try to get out in every way of `ATTEMPTS`; raises `SandboxError` if programs can't be run at all."""
    limits = Limits(wall_s=2.0, cpu_s=2.0, memory_mb=512)
    outcomes = []
    with _outside() as outside:
        for name, source, judge in ATTEMPTS:
            with Session(choice) as session, session.run("program", {"source": outside.fill(source)}, limits) as run:
                ending = run.wait()
                said = run.output().decode(errors="replace").strip()
            held, detail = judge(said, ending, outside)
            outcomes.append(Attempt(name, held, detail[:200]))
    return outcomes


@contextlib.contextmanager
def _outside() -> Iterator[_Outside]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="groupzero-proof-")))
        folder.chmod(0o777)
        secret, mark = secrets.token_hex(16), secrets.token_hex(16)
        (folder / "secret").write_text(secret)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.setblocking(False)
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        name = f"\0groupzero-{mark}"
        abstract.bind(name)
        abstract.listen()
        abstract.setblocking(False)
        yield _Outside(secret, folder / "secret", folder / "written", listener, abstract, name, mark)


_Judge = Callable[[str, Ending, _Outside], tuple[bool, str]]


def _says_held(said: str, ending: Ending, outside: _Outside) -> tuple[bool, str]:
    """Whether the program itself reports that it was refused."""
    del outside
    return said.startswith("refused"), said or f"exit status {ending.exit_status}"


def _secret_kept(said: str, ending: Ending, outside: _Outside) -> tuple[bool, str]:
    del ending
    return outside.secret not in said and said.startswith("refused"), said


def _not_written(said: str, ending: Ending, outside: _Outside) -> tuple[bool, str]:
    del ending
    return not outside.target_path.exists() and said.startswith("refused"), said


def _not_called(said: str, ending: Ending, outside: _Outside) -> tuple[bool, str]:
    del ending
    for listener in (outside.listener, outside.abstract):
        with contextlib.suppress(BlockingIOError):
            listener.accept()[0].close()
            return False, "the listener outside was reached"
    return said.startswith("refused"), said


def _no_survivor(said: str, ending: Ending, outside: _Outside) -> tuple[bool, str]:
    if said != "left a daemon":  # what earlier attempts left behind may be in its way
        return False, f"it could not be tried: exit status {ending.exit_status}"
    time.sleep(0.05)
    survivors = [path.parent.name for path in Path("/proc").glob("[0-9]*/environ") if _has(path, outside.mark)]
    return not survivors, f"survivors: {', '.join(survivors)}" if survivors else f"{said}; none is left"


def _has(path: Path, mark: str) -> bool:
    try:
        return mark.encode() in path.read_bytes()
    except OSError:
        return False


def _stopped(said: str, ending: Ending, outside: _Outside) -> tuple[bool, str]:
    """Whether the run was over in time, whatever it did."""
    del outside
    was = f"stopped for {ending.killed}" if ending.killed else f"exit status {ending.exit_status}"
    return ending.wall_s < 5 and "escaped" not in said, f"{was} after {ending.wall_s:.1f} s {said[-80:]}"


def _few_files(said: str, ending: Ending, outside: _Outside) -> tuple[bool, str]:
    if ending.killed == "files":
        return True, "stopped for files"
    return _says_held(said, ending, outside)


_TRY = """
import ctypes, os, sys
def attempt(*functions):
    reasons = []
    for function in functions:
        try:
            result = function()
        except BaseException as exc:
            reasons.append(f"{type(exc).__name__}: {exc}")
        else:
            print("escaped:", result); sys.exit()
    print("refused:", "; ".join(dict.fromkeys(reasons)))
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return name
"""

ATTEMPTS: tuple[tuple[str, str, _Judge], ...] = (
    (
        "read a file of the host",
        _TRY + "attempt(lambda: open(<SECRET_PATH>).read(), lambda: open('/proc/1/root' + <SECRET_PATH>).read(),"
        " lambda: open('/etc/shadow').read())",
        _secret_kept,
    ),
    (
        "write outside its own /tmp",
        _TRY + "w = lambda p: (lambda: open(p, 'w').write('x'))\n"
        "attempt(w(<TARGET_PATH>), w('/usr/lib/x'), w('/etc/x'), w(os.__file__), w('/x'), w('/program/x'))",
        _not_written,
    ),
    (
        "connect to the network",
        _TRY + "import socket\nattempt(lambda: socket.create_connection(('127.0.0.1', <PORT>), 1),"
        " lambda: socket.create_connection(('8.8.8.8', 53), 1), lambda: socket.create_server(('', 0)))",
        _not_called,
    ),
    (
        "reach a local socket of the host",
        _TRY + "import socket\nattempt(lambda: socket.socket(socket.AF_UNIX).connect(<ABSTRACT>))",
        _not_called,
    ),
    (
        "see other processes",
        _TRY + "def look():\n    pids = [int(n) for n in os.listdir('/proc') if n.isdigit()]\n"
        "    others = [p for p in pids if p not in (1, os.getpid())]\n"
        "    if others: return f'{len(others)} other processes'\n    raise PermissionError('none but itself')\n"
        "attempt(look)",
        _says_held,
    ),
    (
        "kill the verifier and the fork server",
        _TRY + "attempt(lambda: os.kill(<PID>, 9), lambda: os.kill(os.getppid(), 0) if os.getppid() > 1 else"
        " open('/proc/1/mem', 'rb'))",
        _says_held,
    ),
    (
        "trace or read another process's memory",
        _TRY + "attempt(lambda: call('ptrace', 16, os.getppid(), 0, 0), lambda: call('ptrace', 0, 0, 0, 0),"
        " lambda: open(f'/proc/{os.getppid()}/mem', 'rb').read(1), lambda: os.listdir(f'/proc/{os.getppid()}/fd'),"
        " lambda: open(f'/proc/{os.getppid()}/environ').read(9),"
        " lambda: call('process_vm_readv', os.getppid(), 0, 0, 0, 0, 0))",
        _says_held,
    ),
    (
        "mount a file system, change the root, make a namespace",
        _TRY + "attempt(lambda: call('mount', b'x', b'/tmp', b'tmpfs', 0, 0), lambda: os.chroot('/tmp'),"
        " lambda: call('unshare', 0x10000000), lambda: call('unshare', 0x20000), lambda: call('umount2', b'/tmp', 2))",
        _says_held,
    ),
    (
        "become root",
        _TRY + "attempt(lambda: os.setuid(0), lambda: os.setgid(0), lambda: call('prctl', 38, 0, 0, 0, 0))",
        _says_held,
    ),
    (
        "inherit an open file of the verifier",
        _TRY + "import stat\ndef look():\n    found = []\n    for fd in range(3, 4096):\n"
        "        try: found.append((fd, oct(os.fstat(fd).st_mode)))\n        except OSError: pass\n"
        "    if found: return found\n    raise PermissionError('none but its three streams')\nattempt(look)",
        _says_held,
    ),
    (
        "read the verifier's environment",
        _TRY
        + "def look():\n    if 'GROUPZERO_PROOF' in os.environ or any('KEY' in k or 'TOKEN' in k for k in os.environ):"
        "\n        return sorted(os.environ)\n    raise PermissionError('it is empty of it')\nattempt(look)",
        _says_held,
    ),
    (
        "write a file of 1 GiB",
        _TRY + "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\ndef write():\n    with open('/tmp/x' if "
        "os.access('/tmp', os.W_OK) else 'x', 'wb') as f:\n        for _ in range(1024): f.write(bytes(2**20))\n"
        "attempt(write)",
        _says_held,
    ),
    (
        "make 100,000 files",
        _TRY + "def make():\n    for n in range(100_000): open(f'x{n}', 'w').close()\nattempt(make)",
        _few_files,
    ),
    (
        "take 10 GiB of memory",
        _TRY + "attempt(lambda: len(bytearray(10 * 2**30)))",
        _says_held,
    ),
    (
        "fork without end",
        (
            "import os, time\nn = 0\ntry:\n    while n < 5000:\n        if os.fork() == 0: time.sleep(60); os._exit(0)\n"
            "        n += 1\n    print('escaped: 5000 processes', flush=True)\nexcept OSError as exc:\n"
            "    print(f'refused: {n} processes, then {exc}', flush=True)\nwhile True:\n    try: os.fork()\n"
            "    except OSError: pass\n"
        ),
        _stopped,
    ),
    (
        "leave a daemon behind",
        (
            "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
            "        os.execve('/proc/self/exe', ['x', '-c', 'import time; time.sleep(60)'], {'M': <MARK>}) if "
            "os.path.exists('/proc/self/exe') else time.sleep(60)\n    os._exit(0)\ntime.sleep(0.2)\nprint('left a daemon')"
        ),
        _no_survivor,
    ),
    (
        "ignore every signal",
        (
            "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
            "    except (OSError, ValueError): pass\nwhile True: time.sleep(1)\n"
        ),
        _stopped,
    ),
)
