"""What a source could not turn into traces: each loss in a file with its place, and their number by kind."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rollout.durable import write_error


class Unreadable:
    """Writes `{source, place, kind, reason}` lines, anew with each opening; a context manager."""

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source
        self.counts: Counter[str] = Counter()
        self.first: str | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = path.open("w", encoding="utf-8", errors="replace")
        except OSError as error:
            raise write_error(path, error) from error

    def add(self, kind: str, place: str, reason: str, count: int = 1) -> None:
        """Something was lost: `kind` is what is counted, `count` how many traces or rows it was."""
        self.counts[kind] += count
        self.first = self.first or f"{place}: {reason}"
        line = {"source": self.source, "place": place, "kind": kind, "count": count, "reason": reason}
        try:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise write_error(self.path, error) from error

    def __enter__(self) -> Unreadable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
