"""Answers of an endpoint on disk, each whole and synced before the next question, so that none is paid for twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rollout.durable import append_line
from rollout.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question to be asked once: `body` is what is sent, `key` names it by content."""

    key: str
    question_id: str
    sample_index: int
    body: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer: `reasoning` is None where the endpoint does not give it apart from `content`."""

    content: str
    reasoning: str | None
    finish_reason: str | None
    num_tokens: int | None
    model: str | None
    reply_id: str | None


class AnswerJournal:
    """Answers by request key in a JSONL file, each synced to disk before `keep` returns; only offsets are in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[str, int] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._end = 0
        for number, line in enumerate(self._lines(), start=1):
            if not line.endswith(b"\n"):  # a killed process was writing it
                os.truncate(path, self._end)
                break
            self._offsets[_journal_line(path, number, line)["key"]] = self._end
            self._end += len(line)

    def _lines(self) -> Iterator[bytes]:
        if self.path.exists():
            with self.path.open("rb") as file:
                yield from file

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def keep(self, request: Request, reply: Reply) -> None:
        """Append an answer."""
        named = {"key": request.key, "question_id": request.question_id, "sample_index": request.sample_index}
        line = json.dumps(named | asdict(reply))
        append_line(self.path, line)
        self._offsets[request.key] = self._end
        self._end += len(line) + 1  # json.dumps writes ASCII

    def read(self, key: str) -> Reply:
        """The answer to a request that is there."""
        with self.path.open("rb") as file:
            file.seek(self._offsets[key])
            values = json.loads(file.readline())
        return Reply(**{name: values[name] for name in Reply.__dataclass_fields__})


def _journal_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
        if not isinstance(value, dict) or "key" not in value:
            raise ValueError("it has no key")
    except ValueError as error:
        raise UserError(f"{path}, line {number} is damaged ({error}): remove that line to ask again.") from error
    return value
