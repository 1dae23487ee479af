"""Which paths of the host a sandboxed program may read: an interpreter's own, or the compilers' as well."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Python packages that solutions may import, shown if they are installed beside the verifier.
PACKAGES = ("numpy",)
_PACKAGE_ROOT = "/packages"
BUBBLEWRAP_HOME = "/groupzero"  # where the modules of this package are inside
_SYSTEM_LINKS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/usr/lib32", "/usr/libx32", "/usr/local/lib")
_SYSTEM_FILES = (
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/etc/java-17-openjdk",
    "/etc/java-21-openjdk",
    "/etc/ssl/openssl.cnf",
)


@dataclass(frozen=True)
class Place:
    """Host path -> path inside, symbolic links (path, target), where Python finds packages inside, theirs on the host."""

    binds: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...]
    python_path: tuple[str, ...]
    packages: tuple[str, ...]

    def readable(self) -> list[str]:
        """The host's paths themselves, for fences that don't rename."""
        return [source for source, _ in self.binds] + [path for path, _ in self.links]


@functools.cache
def for_profile(profile: str) -> Place:
    """`python`: the interpreter, shared libraries and `PACKAGES`. `native`: all of /usr and the toolchains, too."""
    paths: list[str] = list(_LIBRARIES) if profile == "python" else ["/usr", *_SYSTEM_FILES, *toolchain_paths()]
    links = []
    for path in _SYSTEM_LINKS:
        if os.path.islink(path):
            links.append((path, os.readlink(path)))
        elif os.path.isdir(path) and (profile != "python" or path.startswith("/lib")):
            paths.append(path)
    if profile == "python":
        links = [(path, target) for path, target in links if path.startswith("/lib")]
        paths.append("/etc/ld.so.cache")
    paths += _python_paths()
    packages = _packages()
    binds = [(path, path) for path in _outermost(paths)]
    binds += [(source, f"{_PACKAGE_ROOT}/{os.path.basename(source)}") for source in packages]
    return Place(tuple(binds), tuple(links), (_PACKAGE_ROOT,) if packages else (), tuple(packages))


def _outermost(paths: list[str]) -> list[str]:
    """The paths that exist, each once, without those inside another one."""
    found = sorted({path for path in paths if os.path.exists(path)})
    return [path for path in found if not any(path.startswith(f"{other}/") for other in found if other != path)]


def _python_paths() -> list[str]:
    """What this interpreter reads: its standard library and, if it is not the system's, its whole tree's library folder."""
    stdlib = os.path.dirname(os.__file__)
    library = os.path.dirname(stdlib)
    own = [library] if library.startswith(sys.base_prefix) and sys.base_prefix not in ("/usr", "/") else [stdlib]
    return [*own, os.path.realpath(sys.executable)]


def _packages() -> list[str]:
    found = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        for folder in spec.submodule_search_locations or [] if spec else []:
            found += [folder, *(str(path) for path in Path(folder).parent.glob(f"{name}.libs"))]
    return found


@functools.cache
def toolchain_paths() -> list[str]:
    """Folders outside /usr that compilers found on PATH (or below the home directory) live in."""
    paths = []
    if rust := rust_root():
        paths.append(rust)
    for name in ("go", "node", "java"):
        if (program := shutil.which(name)) and not os.path.realpath(program).startswith("/usr/"):
            paths.append(str(Path(os.path.realpath(program)).parents[1]))
    return paths


@functools.cache
def rust_root() -> str | None:
    """The folder of the Rust toolchain in use, or None."""
    rustc = shutil.which("rustc") or shutil.which("rustc", path=os.path.expanduser("~/.cargo/bin"))
    if rustc is None:
        return None
    try:
        answer = subprocess.run([rustc, "--print", "sysroot"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def bubblewrap_arguments(place: Place) -> list[str]:
    """The command line that puts a fork server into bubblewrap's sandbox, up to the server's own."""
    bwrap = shutil.which("bwrap") or "bwrap"
    arguments = [bwrap, "--unshare-all", "--as-pid-1", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    for source, target in place.binds:
        arguments += ["--ro-bind", source, target]
    for path, target in place.links:
        arguments += ["--symlink", target, path]
    # The server's own modules are imported inside; bubblewrap leaves no other moment.
    arguments += ["--ro-bind", str(Path(__file__).parents[1]), BUBBLEWRAP_HOME]
    arguments += ["--uid", "65534", "--gid", "65534", "--dev", "/dev", "--proc", "/proc"]
    return [*arguments, "--tmpfs", "/tmp", "--tmpfs", "/program", "--chdir", "/tmp", "--remount-ro", "/"]
