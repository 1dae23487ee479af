"""From traces to tokens: the student's prompt and what it is to write, each trace used or dropped for a counted reason."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import TemplateError

from distill.student_config import StudentDataConfig
from distill.trace import Trace, part_files, read_traces
from policy.atomic import atomic_folder
from rollout.errors import UserError
from rollout.records import Task
from rollout.sampling import Prompter
from rollout.templates import CHAT
from rollout.tokenizer import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS, SPANS, COUNTS = "tokens.bin", "spans.npy", "counts.json"
THINK = "<think>"
_BATCH = 64  # traces that are tokenised together
_ID = np.uint32


class Encoded(NamedTuple):
    """A trace as token ids: what the student is given, and what it is to write."""

    prompt: list[int]
    completion: list[int]


@dataclass(frozen=True)
class Encoder:
    """Turns traces into token ids as the student meets them when it samples: the prompt by its template, then its own text.

    The completion is never put through the chat template, whose rules for finished turns may take the reasoning out. The
    end token is the one that the engines stop at.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    data: StudentDataConfig

    def __post_init__(self) -> None:
        if self.template == CHAT and not self.tokenizer.chat_template:
            raise UserError("template = 'chat', but the student's tokenizer has no chat template: set another template")

    def encode(self, traces: Sequence[Trace]) -> list[Encoded | str]:
        """The token ids of each trace, or the reason why it is dropped."""
        texts = [self._texts(trace) for trace in traces]
        usable = [pair for pair in texts if not isinstance(pair, str)]
        ids = iter(self._tokenised([text for pair in usable for text in pair]))
        (end,) = stop_ids(self.tokenizer)
        return [
            text if isinstance(text, str) else self._fitted(next(ids), next(ids), trace, end)
            for text, trace in zip(texts, traces, strict=True)
        ]

    def _texts(self, trace: Trace) -> tuple[str, str] | str:
        """Prompt and completion, or a reason."""
        if not trace.completion.strip():
            return "empty completion"
        if not self.data.keep_faulty and trace.fault is not None:
            return f"fault of form: {trace.fault}"
        if not self.data.keep_faulty and trace.finish_reason == "length":
            return "cut off by the teacher's length limit"
        prompter = Prompter(self.tokenizer, self.template, max_model_len=0, max_completion_tokens=0)
        question = trace.question if isinstance(trace.question, str) else trace.messages
        try:
            prompt = prompter.text(Task(task_id=trace.question_id, prompt=question, answer=None))
        except TemplateError as error:
            return f"the chat template refuses the question: {error}"
        except UserError:
            if isinstance(question, str):
                raise
            return f"the template can't take the chat messages {', '.join(m['role'] for m in question)}"
        return prompt, without_opened_tag(prompt, trace.completion)

    def _tokenised(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _fitted(self, prompt: list[int], completion: list[int], trace: Trace, end: int) -> Encoded | str:
        limit = self.data.max_tokens
        if end in completion:
            return "the completion contains the end token"
        if trace.finish_reason != "length":
            completion = [*completion, end]
        if len(prompt) + len(completion) <= limit:
            return Encoded(prompt, completion)
        if self.data.overlong == "drop" or len(prompt) >= limit:
            return "longer than data.max_tokens"
        return Encoded(prompt, completion[: limit - len(prompt)])


def without_opened_tag(prompt: str, completion: str) -> str:
    """The completion without the think tag that the prompt ends with, as chat templates of reasoning models do."""
    _, tag, after = prompt.rpartition(THINK)
    if not tag or after.strip() or not completion.startswith(THINK):
        return completion
    return completion[len(THINK) :].removeprefix(after)


class TokenStore:
    """Tokenised traces in a folder, mapped into memory: row i is its prompt and its completion, one after the other.

    `counts` says what became of every trace: num_traces = num_used + the sum of `dropped`, by reason.
    """

    def __init__(self, folder: Path) -> None:
        self._spans = np.load(folder / SPANS)  # [N, 3]: start, first of the completion, end
        self._tokens = np.memmap(folder / TOKENS, dtype=_ID, mode="r")
        self.counts: dict[str, Any] = json.loads((folder / COUNTS).read_text())

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row [N]."""
        return self._spans[:, 2] - self._spans[:, 0]

    def row(self, index: int) -> tuple[np.ndarray, int]:
        """The ids [n] of a row, as int64, and how many of them are the prompt's."""
        start, middle, end = self._spans[index].tolist()
        return self._tokens[start:end].astype(np.int64), middle - start


def open_store(folder: Path, encoder: Encoder, progress: Callable[[int], None]) -> TokenStore:
    """The tokenised traces in `folder`, made now from the encoder's data unless they are there; whole or not at all.

    Memory holds a few traces at a time. `progress` hears how many are done. UserError where no trace is left.
    """
    if not (folder / COUNTS).exists():
        traces = islice(read_traces(encoder.data.path), encoder.data.max_traces)
        with atomic_folder(folder) as temporary:
            counts = _write(temporary, traces, encoder, progress)
            if not counts["num_used"]:
                reasons = "; ".join(f"{count} x {reason}" for reason, count in counts["dropped"].items())
                raise UserError(f"{encoder.data.path}: no trace is left to learn from ({reasons or 'it is empty'})")
            digest = {"path": str(encoder.data.path), "sha256": _digest(encoder.data.path)}
            (temporary / COUNTS).write_text(json.dumps(counts | digest, indent=2) + "\n")
    return TokenStore(folder)


def _write(folder: Path, traces: Iterable[Trace], encoder: Encoder, progress: Callable[[int], None]) -> dict[str, Any]:
    spans: list[tuple[int, int, int]] = []
    dropped: Counter[str] = Counter()
    num_traces = place = num_targets = 0
    with (folder / TOKENS).open("wb") as file:
        for batch in _batches(traces):
            for encoded in encoder.encode(batch):
                if isinstance(encoded, str):
                    dropped[encoded] += 1
                    continue
                prompt, completion = encoded
                file.write(np.asarray([*prompt, *completion], dtype=_ID).tobytes())
                middle = place + len(prompt)
                spans.append((place, middle, middle + len(completion)))
                place, num_targets = middle + len(completion), num_targets + len(completion)
            num_traces += len(batch)
            progress(num_traces)
    np.save(folder / SPANS, np.asarray(spans, dtype=np.int64).reshape(-1, 3))
    return {
        "num_traces": num_traces,
        "num_used": len(spans),
        "dropped": dict(dropped.most_common()),
        "num_tokens": place,
        "num_completion_tokens": num_targets,
    }


def _batches(traces: Iterable[Trace]) -> Iterator[list[Trace]]:
    iterator = iter(traces)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's parts one after the other."""
    digest = hashlib.sha256()
    for file in part_files(path) if path.is_dir() else [path]:
        with file.open("rb") as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
