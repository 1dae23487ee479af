"""The languages programs may be in: how each is compiled once and run, and whether its tools are here."""

from __future__ import annotations

import functools
import os
import re
import shutil
from dataclasses import dataclass

from verifiers.code import layout


class LanguageError(RuntimeError):
    """The language is unknown, or its compiler or interpreter is not on this machine."""


@dataclass(frozen=True)
class Toolchain:
    """Commands for one program; `{work}` stands for the folder that holds it. No `compile` command: nothing to compile.

    `limits_address_space` is off for runtimes that reserve far more addresses than they use; the memory they really
    use is limited either way.
    """

    language: str
    source_name: str
    compile: tuple[str, ...] | None
    run: tuple[str, ...]
    limits_address_space: bool = True


# Fence tags and option values -> language.
ALIASES = {
    **dict.fromkeys(("python", "py", "python3", "py3", "pypy", "pypy3", "cpython"), "python"),
    **dict.fromkeys(("cpp", "c++", "cc", "cxx", "cpp17", "cpp20", "c++17", "c++20"), "cpp"),
    **dict.fromkeys(("c", "c99", "c11"), "c"),
    **dict.fromkeys(("javascript", "js", "node", "nodejs", "mjs"), "javascript"),
    "java": "java",
    **dict.fromkeys(("rust", "rs"), "rust"),
    **dict.fromkeys(("go", "golang"), "go"),
    **dict.fromkeys(("bash", "sh", "shell"), "bash"),
}
LANGUAGES = tuple(dict.fromkeys(ALIASES.values()))
_PATH = "/usr/local/bin:/usr/bin:/bin"
_JAVA_MAIN = re.compile(r"\bclass\s+(\w+)[^{]*\{(?:(?!\bclass\b).)*?\bstatic\s+(?:final\s+)?void\s+main\b", re.DOTALL)
_JAVA_PUBLIC = re.compile(r"^\s*public\s+(?:final\s+|abstract\s+)*class\s+(\w+)", re.MULTILINE)
_JAVA_NAME = re.compile(r"[A-Za-z_]\w{0,99}")


def canonical(name: str) -> str:
    """The language that a tag or option value names; raises `LanguageError`."""
    language = ALIASES.get(name.strip().lower())
    if language is None:
        raise LanguageError(f"language {name!r} is not one of {', '.join(LANGUAGES)}")
    return language


@functools.cache
def _tool(language: str, *names: str) -> str:
    for name in names:
        found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_PATH}")
        if found:
            return os.path.realpath(found) if name in ("go", "node") else found
    raise LanguageError(f"{language} programs can't be run here: {' or '.join(names)} is not installed")


def is_available(language: str) -> bool:
    """Whether a program in this language can be run here."""
    try:
        toolchain(language, "")
    except LanguageError:
        return False
    return True


def toolchain(language: str, source: str) -> Toolchain:
    """How to compile and run `source`; raises `LanguageError` if the tools are missing. Python needs none."""
    if language == "python":
        return Toolchain("python", "solution.py", None, ())
    return _BUILDERS[language](source)


def _cpp(source: str) -> Toolchain:
    del source
    compiler = _tool("C++", "g++", "clang++")
    command = (compiler, "-O2", "-std=c++17", "-w", "-pipe", "-o", "{work}/main", "{work}/main.cpp")
    return Toolchain("cpp", "main.cpp", command, ("{work}/main",))


def _c(source: str) -> Toolchain:
    del source
    compiler = _tool("C", "gcc", "clang", "cc")
    command = (compiler, "-O2", "-std=gnu11", "-w", "-pipe", "-o", "{work}/main", "{work}/main.c", "-lm")
    return Toolchain("c", "main.c", command, ("{work}/main",))


def _javascript(source: str) -> Toolchain:
    name = "main.mjs" if re.search(r"^\s*(import\s.*\sfrom\s|export\s)", source, re.MULTILINE) else "main.js"
    command = (_tool("JavaScript", "node", "nodejs"), "--stack-size=8000", f"{{work}}/{name}")
    return Toolchain("javascript", name, None, command, limits_address_space=False)


def _java(source: str) -> Toolchain:
    match = _JAVA_PUBLIC.search(source) or _JAVA_MAIN.search(source)
    name = match[1] if match and _JAVA_NAME.fullmatch(match[1]) else "Main"
    java, javac = _tool("Java", "java"), _tool("Java", "javac")
    common = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", "-Xshare:auto")
    compile_command = (javac, *(f"-J{flag}" for flag in common), "-nowarn", "-d", "{work}", f"{{work}}/{name}.java")
    command = (java, *common, "-XX:+UseCompressedOops", "-Xss64m", "-Xmx{memory_mb}m", "-cp", "{work}", name)
    return Toolchain("java", f"{name}.java", compile_command, command, limits_address_space=False)


def _rust(source: str) -> Toolchain:
    del source
    root = layout.rust_root()
    if root is None:
        raise LanguageError("Rust programs can't be run here: rustc is not installed")
    command = (f"{root}/bin/rustc", "--sysroot", root, "-O", "--edition=2021", "-Awarnings", "-o", "{work}/main")
    return Toolchain("rust", "main.rs", (*command, "{work}/main.rs"), ("{work}/main",), limits_address_space=True)


def _go(source: str) -> Toolchain:
    del source
    command = (_tool("Go", "go"), "build", "-o", "{work}/main", "{work}/main.go")
    return Toolchain("go", "main.go", command, ("{work}/main",), limits_address_space=False)


def _bash(source: str) -> Toolchain:
    del source
    return Toolchain("bash", "main.sh", None, (_tool("bash", "bash"), "{work}/main.sh"))


_BUILDERS = {
    "cpp": _cpp,
    "c": _c,
    "javascript": _javascript,
    "java": _java,
    "rust": _rust,
    "go": _go,
    "bash": _bash,
}

ENVIRONMENT = {
    "PATH": _PATH,
    "LANG": "C.UTF-8",
    "GOCACHE": "/tmp/go",
    "GOPATH": "/tmp/gopath",
    "GOFLAGS": "-mod=mod",
    "GO111MODULE": "off",
    "UV_USE_IO_URING": "0",
    "MALLOC_ARENA_MAX": "2",
}
