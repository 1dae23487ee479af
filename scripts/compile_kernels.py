"""Compile every Triton kernel for Hopper without a GPU, and compare what comes out with the committed table.

`python -m scripts.compile_kernels` compares and exits with 1 where a default configuration spills, a product of FP8
tiles has no QGMMA, or a figure differs from policy/kernels/compiled.json; `--update` writes the figures there first
(spills and missing QGMMA still fail). `--triton-path DIR` compiles with the triton installed in that folder (`pip
install --target`) instead of the environment's own: the table has a part per version. About half a second per kernel,
a tenth when triton's cache has it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from policy.kernels.compile_cases import Figures, Table, problems

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "policy" / "kernels" / "compiled.json"
COLUMNS = [field.name for field in fields(Figures)]


class CompilationError(RuntimeError):
    """A kernel does not compile, or a module does not say how; the message holds the compiler's."""


def compile_all(
    names: Sequence[str] = (), triton_path: Path | None = None, jobs: int = 2
) -> tuple[str, dict[str, Figures]]:
    """Triton's version and the figures of all cases (or of those named), compiled in `jobs` processes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # What 3.6 does and 3.10 will stop doing unless told.
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    environment["OMP_NUM_THREADS"] = "1"
    if triton_path is not None:
        if not (triton_path / "triton").is_dir():
            raise CompilationError(f"{triton_path} holds no triton: fill it with `pip install --no-deps --target`")
        environment["PYTHONPATH"] = os.pathsep.join([str(triton_path.resolve()), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "policy.kernels.compile_triton", str(jobs), *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompilationError(done.stderr.strip())
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["triton"], {name: Figures(**values) for name, values in answer["figures"].items()}


def write_table(path: Path, version: str, figures: dict[str, Figures], partial: bool) -> None:
    """Put the figures into the table, one case a line; `partial` keeps the version's other cases."""
    table: dict[str, Table] = json.loads(path.read_text()) if path.exists() else {}
    rows = table.get(version, {}) if partial else {}
    table[version] = {**rows, **{name: vars(values) for name, values in figures.items()}}
    parts = []
    for key, cases in sorted(table.items()):
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(cases[name])}" for name in sorted(cases))
        parts.append(f"  {json.dumps(key)}: {{\n{lines}\n  }}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def markdown(figures: dict[str, Figures]) -> str:
    """The figures as a Markdown table."""
    rows = [["case", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    rows += [[name, *(str(getattr(figures[name], column)) for column in COLUMNS)] for name in sorted(figures)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases to compile (default: all)")
    parser.add_argument("--update", action="store_true", help="write the figures into the table")
    parser.add_argument("--triton-path", type=Path, help="folder with another triton")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    try:
        version, figures = compile_all(options.names, options.triton_path, options.jobs)
    except CompilationError as error:
        print(error, file=sys.stderr)
        return 1
    if options.update:
        write_table(options.table, version, figures, partial=bool(options.names))
    recorded: Table = (json.loads(options.table.read_text()) if options.table.exists() else {}).get(version, {})
    if options.names:
        recorded = {name: row for name, row in recorded.items() if name in options.names}
    found = problems(recorded, figures)
    print(f"triton {version}, sm_90\n\n{markdown(figures)}")
    if found:
        print("\n".join(["", *found, "", "Announce changes with `python -m scripts.compile_kernels --update`."]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
