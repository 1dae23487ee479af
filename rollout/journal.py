"""Finished calls of the engines on disk, so that a killed run need not sample them again.

A call leaves two files: its samples, as soon as they are sampled, and its verdicts, as soon as they are scored. Each is
a digest and a payload, written whole or not at all, and names everything the samples depend on. Values come back as they
were, log-probabilities bit for bit. Routing and sampling masks are kept too, so with them a journal takes the room that
they take in memory, before compression.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rollout.durable import write_bytes
from rollout.engine import SamplingParams
from rollout.records import Group, Sample, SamplingMask, Task
from verifiers.verdict import Verdict

FORMAT = 1
_MAGIC = b"groupzero rollout\n"
_DIGEST_BYTES = 32
_FAILED = ("error", "timeout")
_BINARY = (
    "prompt_ids",
    "completion_ids",
    "rollout_logprobs",
    "completion_text",
    "routed_experts",
    "mask_offsets",
    "mask_token_ids",
)
_TEXT = ("task_id", "finish_reason")
_NUMBERS = ("sample_index", "version_first", "version_last", "num_draft_tokens", "num_accepted_tokens")


@dataclass(frozen=True)
class Call:
    """One call of the engine, with all that its samples depend on beside the tasks."""

    draw: int
    number: int
    seed: int
    group_size: int
    params: SamplingParams
    policy_version: int


class JournalError(ValueError):
    """A file of the journal that can't be used; the message says why."""


class RolloutJournal:
    """The calls of a run in `folder`; a file that can't be used is told to `message` and read as if it were not there."""

    def __init__(self, folder: Path, message: Callable[[str], None]) -> None:
        self.folder = Path(folder)
        self._message = message
        for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()

    def write_samples(self, call: Call, groups: Sequence[Group]) -> None:
        """Keep a call's samples; their verdicts, if any, are not written. UserError when the disk fails."""
        write_bytes(self._path(call, "samples"), _sealed(_to_arrow(_fingerprint(call, _tasks(groups)), groups)))

    def write_verdicts(self, call: Call, groups: Sequence[Group]) -> None:
        """Keep the verdicts of a call whose samples are kept.

        Those of a verifier that failed (error, timeout) are not: they are scored again, so that a run which stopped
        because of its verifier goes on once that is mended.
        """
        samples = [sample for group in groups for sample in group.samples]
        value = {
            "fingerprint": _fingerprint(call, _tasks(groups)) | {"completions": _completions_digest(samples)},
            "verdicts": [_verdict_to_json(sample.verdict) for sample in samples],
        }
        write_bytes(self._path(call, "verdicts"), _sealed(json.dumps(value).encode()))

    def read(self, call: Call, tasks: Sequence[Task]) -> list[Group] | None:
        """The call's groups, each sample with its verdict where one was kept; None where they must be sampled."""
        fingerprint = _fingerprint(call, tasks)
        try:
            samples = _from_arrow(_unsealed(self._path(call, "samples")), fingerprint)
        except FileNotFoundError:
            return None
        except (JournalError, OSError) as error:
            self._message(f"{self._path(call, 'samples')} is not used, its call is sampled again: {error}")
            return None
        verdicts = self._verdicts(call, fingerprint | {"completions": _completions_digest(samples)}, len(samples))
        samples = [replace(sample, verdict=verdict) for sample, verdict in zip(samples, verdicts, strict=True)]
        size = call.group_size
        return [
            Group(task=task, samples=tuple(samples[number * size : (number + 1) * size]))
            for number, task in enumerate(tasks)
        ]

    def prune(self, first_draw_kept: int) -> None:
        """Remove all calls of earlier draws; safe while another thread writes later ones."""
        for path in self.folder.glob("draw-*"):
            draw = path.name.split("-")[1]
            if draw.isdecimal() and int(draw) < first_draw_kept:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove everything, for a run that is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, call: Call, kind: str) -> Path:
        return self.folder / f"draw-{call.draw:08d}-call-{call.number:05d}.{kind}"

    def _verdicts(self, call: Call, fingerprint: Mapping[str, Any], count: int) -> list[Verdict | None]:
        path = self._path(call, "verdicts")
        try:
            value = json.loads(_unsealed(path))
            _check(value["fingerprint"], fingerprint)
            return [None if verdict is None else Verdict(**verdict) for verdict in value["verdicts"]]
        except FileNotFoundError:
            pass
        except (JournalError, OSError) as error:
            self._message(f"{path} is not used, its samples are scored again: {error}")
        return [None] * count


def _tasks(groups: Sequence[Group]) -> list[Task]:
    return [group.task for group in groups]


def _fingerprint(call: Call, tasks: Sequence[Task]) -> dict[str, Any]:
    """What must be the same for samples to be used again, as plain JSON values; of a task its id and a digest."""
    value = {"format": FORMAT, **asdict(call), "tasks": [[task.task_id, _task_digest(task)] for task in tasks]}
    return json.loads(json.dumps(value))


def _task_digest(task: Task) -> str:
    content = json.dumps(asdict(task), sort_keys=True, default=repr)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _completions_digest(samples: Sequence[Sample]) -> str:
    """Of the texts: samples that were drawn anew must not get the verdicts of those before them."""
    content = json.dumps([sample.completion_text for sample in samples])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _check(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        long = ("tasks", "completions")
        pairs = [key if key in long else f"{key} {found.get(key)} -> {wanted[key]}" for key in different]
        raise JournalError(f"it is of another call ({', '.join(pairs)})")


def _sealed(payload: bytes) -> bytes:
    return _MAGIC + hashlib.blake2b(payload, digest_size=_DIGEST_BYTES).digest() + payload


def _unsealed(path: Path) -> bytes:
    """The payload of a file that is whole; JournalError or OSError otherwise."""
    data = path.read_bytes()
    head = len(_MAGIC) + _DIGEST_BYTES
    if not data.startswith(_MAGIC):
        raise JournalError("it is not a file of the journal")
    if hashlib.blake2b(data[head:], digest_size=_DIGEST_BYTES).digest() != data[len(_MAGIC) : head]:
        raise JournalError("it is damaged (its digest is another)")
    return data[head:]


def _verdict_to_json(verdict: Verdict | None) -> dict[str, Any] | None:
    if verdict is None or verdict.status in _FAILED:
        return None
    return verdict.to_dict()


def _to_arrow(fingerprint: Mapping[str, Any], groups: Sequence[Group]) -> bytes:
    """One row per sample as an Arrow file, arrays as their bytes."""
    import pyarrow as pa

    rows = [_to_row(sample) for group in groups for sample in group.samples]
    columns = [(name, pa.large_binary()) for name in _BINARY] + [(name, pa.string()) for name in _TEXT]
    columns += [(name, pa.int64()) for name in _NUMBERS]
    schema = pa.schema(columns, metadata={"fingerprint": json.dumps(fingerprint)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return sink.getvalue().to_pybytes()


def _from_arrow(payload: bytes, fingerprint: Mapping[str, Any]) -> list[Sample]:
    import pyarrow as pa

    with pa.ipc.open_file(pa.BufferReader(payload)) as reader:
        metadata = reader.schema.metadata or {}
        _check(json.loads(metadata[b"fingerprint"]), fingerprint)
        return [_from_row(row) for row in reader.read_all().to_pylist()]


def _to_row(sample: Sample) -> dict[str, Any]:
    mask = sample.sampling_mask
    return {
        "task_id": sample.task_id,
        "sample_index": sample.sample_index,
        "prompt_ids": _array_bytes(np.asarray(sample.prompt_ids, np.int32)),
        "completion_ids": _array_bytes(np.asarray(sample.completion_ids, np.int32)),
        "rollout_logprobs": _array_bytes(sample.rollout_logprobs),
        "version_first": sample.policy_versions[0],
        "version_last": sample.policy_versions[1],
        "finish_reason": sample.finish_reason,
        "completion_text": sample.completion_text.encode("utf-8", "surrogatepass"),
        "routed_experts": _array_bytes(sample.routed_experts),
        "mask_offsets": _array_bytes(None if mask is None else mask.offsets),
        "mask_token_ids": _array_bytes(None if mask is None else mask.token_ids),
        "num_draft_tokens": sample.num_draft_tokens,
        "num_accepted_tokens": sample.num_accepted_tokens,
    }


def _from_row(row: Mapping[str, Any]) -> Sample:
    routed_experts, offsets = row["routed_experts"], row["mask_offsets"]
    mask = None if offsets is None else SamplingMask(_array(offsets), _array(row["mask_token_ids"]))
    return Sample(
        task_id=row["task_id"],
        sample_index=row["sample_index"],
        prompt_ids=tuple(_array(row["prompt_ids"]).tolist()),
        completion_ids=tuple(_array(row["completion_ids"]).tolist()),
        rollout_logprobs=_array(row["rollout_logprobs"]),
        policy_versions=(row["version_first"], row["version_last"]),
        finish_reason=row["finish_reason"],
        completion_text=row["completion_text"].decode("utf-8", "surrogatepass"),
        routed_experts=None if routed_experts is None else _array(routed_experts),
        sampling_mask=mask,
        num_draft_tokens=row["num_draft_tokens"],
        num_accepted_tokens=row["num_accepted_tokens"],
    )


def _array_bytes(array: np.ndarray | None) -> bytes | None:
    """The array with its type and shape (NumPy's own format, which holds no objects)."""
    if array is None:
        return None
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _array(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)
