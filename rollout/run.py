"""The run folder: what a run was, what it measured and every sample, so that it can be read, resumed and reproduced."""

from __future__ import annotations

import json
import math
import shlex
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rollout.durable import FolderLock, append_line, jsonable, write_bytes, write_error, write_json
from rollout.errors import UserError
from rollout.provenance import write_provenance
from rollout.records import Group
from rollout.sample_table import MERGED, PARTS, Phase, merge_parts, truncate_samples, write_part

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
CONFIG = "config.toml"
_MAX_DIFFERENCES_SHOWN = 20


class Observer(Protocol):
    """Whoever watches a run: the terminal display, or nobody."""

    def stage(self, name: str, detail: str = "") -> None:
        """A stage begins; the same name again only changes its detail."""
        ...

    def step(self, step: int, num_steps: int, metrics: Mapping[str, Any]) -> None:
        """`step` steps of the stage are done (1 after the first one), `metrics` being those of the last."""
        ...

    def message(self, text: str) -> None:
        """Something to say once."""
        ...

    def close(self) -> None:
        """The run is over, well or not; may be called twice."""
        ...


class SilentObserver:
    """An observer that shows nothing."""

    def stage(self, name: str, detail: str = "") -> None:
        """Ignored."""

    def step(self, step: int, num_steps: int, metrics: Mapping[str, Any]) -> None:
        """Ignored."""

    def message(self, text: str) -> None:
        """Ignored."""

    def close(self) -> None:
        """Nothing to end."""


class RunRecord:
    """The one writer of a run folder; made by `RunRecord.open`, holds the folder's lock until `close`."""

    def __init__(
        self, run_dir: Path, config: Mapping[str, Any], lock: FolderLock, *, command: str, resumed: bool
    ) -> None:
        self.run_dir = run_dir
        self.config = config
        self.resumed = resumed
        self._lock = lock
        self._command = command

    @classmethod
    def open(
        cls,
        run_dir: Path,
        config: Mapping[str, Any],
        config_toml: str,
        *,
        resume: bool,
        command: str = "train",
        source: Path | None = None,
    ) -> RunRecord:
        """Create `run_dir`, or take up the unfinished run in it; `config_toml` is the resolved `config` as TOML.

        UserError, with nothing changed on disk, for a folder in use, of another config, finished, that isn't a run's, or
        without a run where `resume` asks for one. `command` is the sub-command that goes on with the run; `source` is a
        folder of the code whose git state is kept (default: this package's).
        """
        run_dir = Path(run_dir)
        if resume and not (run_dir / CONFIG).exists():
            raise UserError(f"there is no run to resume in {run_dir}. Start it without --resume, or check the name.")
        _refuse_foreign_folder(run_dir)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(run_dir, error) from error
        lock = FolderLock(run_dir)
        try:
            _check_folder(run_dir, config_toml, command=command)
            record = cls(run_dir, config, lock, command=command, resumed=(run_dir / CONFIG).exists())
            record._begin(config_toml, source or Path(__file__).resolve().parent)
            return record
        except BaseException:
            lock.release()
            raise

    def _begin(self, config_toml: str, source: Path) -> None:
        for folder in (self.run_dir, self.run_dir / PARTS):
            for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote; the lock is ours
                leftover.unlink()
        if not self.resumed:
            write_bytes(self.run_dir / CONFIG, config_toml.encode())
        write_provenance(self._provenance_folder(), source)
        metrics = self.run_dir / METRICS
        if metrics.exists() and not metrics.read_bytes().endswith(b"\n"):
            self._rewrite_metrics(read_metrics(self.run_dir))

    def _provenance_folder(self) -> Path:
        if not (self.run_dir / "git.diff").exists():  # new, or killed before it had said what it runs on
            return self.run_dir
        return self.run_dir / "resumes" / f"{sum(1 for _ in (self.run_dir / 'resumes').glob('*')) + 1:03d}"

    @property
    def command_to_resume(self) -> str:
        """The shell command that goes on with this run, from any state."""
        return command_to_resume(self.run_dir, self._command)

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, in the file before this returns.

        A NaN or infinity is written as null, which every JSON reader takes; `non_finite` then keeps which it was.
        """
        line = {key: jsonable(value, key) for key, value in metrics.items()}
        lost = {key: str(float(value)) for key, value in metrics.items() if line[key] is None and _is_number(value)}
        append_line(
            self.run_dir / METRICS, json.dumps(line | ({"non_finite": lost} if lost else {}), ensure_ascii=False)
        )

    def write_samples(self, step: int, groups: Sequence[Group], phase: Phase, prompts: Sequence[str]) -> None:
        """Keep every sample of one step and phase, `prompts` being the text of each group's prompt; again: replaces."""
        write_part(self.run_dir, step, groups, phase, prompts)

    def finish_samples(self) -> Path:
        """Merge all samples into `samples.parquet` and return its path; may be called again after more were written."""
        return merge_parts(self.run_dir)

    def truncate(self, step: int) -> None:
        """Forget metrics and samples at or beyond `step`, which is about to be done again; `eval_before` stays."""
        lines = read_metrics(self.run_dir)
        kept = [line for line in lines if not isinstance(line.get("step"), int) or line["step"] < step]
        if len(kept) != len(lines):
            self._rewrite_metrics(kept)
        truncate_samples(self.run_dir, step)

    def write_json(self, name: str, value: Any) -> Path:
        """Replace `<run>/<name>` (".json" added where missing) as a whole."""
        path = self.run_dir / (name if name.endswith(".json") else f"{name}.json")
        write_json(path, value)
        return path

    def log_path(self, name: str) -> Path:
        """`<run>/logs/<name>.log`, its folder made."""
        folder = self.run_dir / "logs"
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.log"

    def close(self) -> None:
        """Free the folder for another process; a second call does nothing."""
        self._lock.release()

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _rewrite_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_bytes(self.run_dir / METRICS, text.encode())


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order ([] without one); a half-written last line of a killed run is dropped."""
    path = Path(run_dir) / METRICS
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    metrics: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not JSON ({error}). Mend or remove that line.") from error
        if not isinstance(value, dict):
            raise UserError(f"{path}, line {number}: expected an object of metrics, found {type(value).__name__}.")
        metrics.append(value)
    return metrics


def command_to_resume(run_dir: Path, command: str = "train") -> str:
    """The shell command that goes on with the run in `run_dir` from its own resolved config."""
    return f"{program()} {command} {shlex.quote(str(run_dir / CONFIG))}"


def program() -> str:
    """How this process's command line was called, such as `.venv/bin/groupzero`; just `groupzero` inside other programs."""
    called = Path(sys.argv[0])
    return shlex.quote(str(called)) if called.name == "groupzero" else "groupzero"


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every difference, None standing for a key that isn't set."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    keys = [*flat_old, *(key for key in flat_new if key not in flat_old)]
    pairs = [(key, flat_old.get(key), flat_new.get(key)) for key in keys]
    return [(key, before, after) for key, before, after in pairs if before != after]


def _check_folder(run_dir: Path, config_toml: str, *, command: str) -> None:
    path = run_dir / CONFIG
    if not path.exists():
        return
    try:
        old = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read ({error}). Mend it, or give the run another name.") from error
    differences = config_differences(old, tomllib.loads(config_toml))
    if differences:
        raise UserError(_other_config(run_dir, differences, command))
    if (run_dir / SUMMARY).exists():
        raise UserError(
            f"{run_dir} holds a finished run; its report is {run_dir / 'report.html'}. "
            "To run again, give the run another name or remove the folder."
        )


def _refuse_foreign_folder(run_dir: Path) -> None:
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file, and the run needs a folder of that name. Give the run another name.")
    if not run_dir.exists() or (run_dir / CONFIG).exists():
        return
    # `.lock` and `logs` are what a start that failed before its config was written leaves behind.
    foreign = sorted(entry.name for entry in run_dir.iterdir() if entry.name not in (".lock", f".{CONFIG}.tmp", "logs"))
    if foreign:
        found = ", ".join(foreign[:3])
        raise UserError(f"{run_dir} isn't a run's folder (no {CONFIG}; it holds {found}). Give the run another name.")


def _other_config(run_dir: Path, differences: list[tuple[str, Any, Any]], command: str) -> str:
    shown = differences[:_MAX_DIFFERENCES_SHOWN]
    lines = [f"{run_dir} holds a run with another config:"]
    lines += [f"  {key}: {_toml(old)} -> {_toml(new)}" for key, old, new in shown]
    if len(differences) > len(shown):
        lines.append(f"  and {len(differences) - len(shown)} more")
    lines.append("For a new run, give it another name. ")
    restore = [shlex.quote(f"{key}={_toml(old)}") for key, old, _ in shown if old is not None]
    restore += [f"(leave out {key})" for key, old, _ in shown if old is None]
    lines[-1] += f"For the one that is there, give the values it has: {' '.join(restore)}"
    if (run_dir / SUMMARY).exists():
        lines.append(f"It is finished; its report is {run_dir / 'report.html'}")
    elif _has_state(run_dir):
        lines.append(f"To go on with it: {command_to_resume(run_dir, command)}")
    else:
        lines.append("It has done no step yet: the folder can be removed without loss.")
    return "\n".join(lines)


def _has_state(run_dir: Path) -> bool:
    files = (run_dir / METRICS, run_dir / MERGED)
    folders = (run_dir / PARTS, run_dir / "checkpoints", run_dir / "raw")
    return any(file.exists() and file.stat().st_size for file in files) or any(
        folder.is_dir() and any(folder.iterdir()) for folder in folders
    )


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def _toml(value: Any) -> str:
    if value is None:
        return "(not set)"
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def _is_number(value: Any) -> bool:
    try:
        return value is not None and not isinstance(value, str) and not math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
