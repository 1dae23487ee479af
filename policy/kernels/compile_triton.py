"""Compiles the kernels for sm_90 on a machine without a GPU: triton's wheel brings the assembler and its disassembler.

`python -m policy.kernels.compile_triton 2 [NAME ..]` compiles all cases (or those named) in two processes and prints
{"triton": version, "figures": {name: figures}} as JSON.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import policy.kernels
from policy.kernels.compile_cases import CompileCase, Figures

TARGET = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def all_cases(complete: bool = True) -> dict[str, CompileCase]:
    """COMPILE_CASES of every *_triton module by name; a name used twice, or (`complete`) a module without, is a ValueError."""
    cases: dict[str, CompileCase] = {}
    for module in pkgutil.iter_modules(policy.kernels.__path__, "policy.kernels."):
        if not module.name.endswith("_triton") or module.name == "policy.kernels.compile_triton":
            continue
        listed: list[CompileCase] = getattr(importlib.import_module(module.name), "COMPILE_CASES", [])
        if complete and not listed:
            raise ValueError(
                f"{module.name} has no COMPILE_CASES: list its kernels with the types they are launched with"
            )
        for case in listed:
            if case.name in cases:
                raise ValueError(f"{module.name}: another compile case is called {case.name}")
            cases[case.name] = case
    return cases


def compile_case(case: CompileCase) -> Figures:
    """Compile one case; arguments that are missing from it or unknown to the kernel are a ValueError."""
    compiled = triton.compile(
        _source(case), target=TARGET, options={"num_warps": case.num_warps, "num_stages": case.num_stages}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-sass", "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    products = re.findall(r"= tt\.dot .*f8E4M3FN.*->", compiled.asm["ttir"])
    return Figures(
        registers=_resource(listing, "REG"),
        spill_bytes=_resource(listing, "STACK"),
        shared_bytes=compiled.metadata.shared,
        qgmma=_count(listing, "QGMMA"),
        hgmma=_count(listing, "HGMMA"),
        tma=_count(listing, "UTMALDG|UTMASTG|UTMAREDG"),
        fp8_products=len(products),
        default=case.default,
    )


def _source(case: CompileCase) -> ASTSource:
    names: list[str] = case.kernel.arg_names
    given = {*case.signature, *case.constants}
    if set(names) != given or len(given) < len(case.signature) + len(case.constants):
        odd = sorted(set(names) ^ given) or sorted(set(case.signature) & set(case.constants))
        raise ValueError(f"{case.name}: {', '.join(odd)} must be in the kernel and in either signature or constants")
    types = {name: case.signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    aligned = [n for n, kind in case.signature.items() if kind.startswith("*") or n in case.aligned]
    attributes: dict[Any, Any] = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(case.kernel, types, constants, attributes)


def _resource(listing: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", listing)
    if found is None:
        raise ValueError(f"cuobjdump reports no {name}; its output begins {listing[:200]!r}")
    return int(found[1])


def _count(listing: str, instruction: str) -> int:
    return len(re.findall(rf"\b(?:{instruction})\b", listing))


def main(jobs: str, *names: str) -> None:
    cases = all_cases(complete=not names)
    chosen = {name: cases[name] for name in names} or cases
    # Forked, so that torch and triton are imported once and the cases need not be pickled.
    with ProcessPoolExecutor(int(jobs), multiprocessing.get_context("fork")) as pool:
        futures = {name: pool.submit(_compile_named, name) for name in chosen}
    figures = {name: future.result() for name, future in futures.items()}
    print(json.dumps({"triton": triton.__version__, "figures": figures}))


def _compile_named(name: str) -> dict[str, Any]:
    return asdict(compile_case(all_cases(complete=False)[name]))


if __name__ == "__main__":
    main(*sys.argv[1:])
