"""Rows of a local dataset, read in order or by number without holding them in memory; never the network."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from rollout.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]


class Rows(Protocol):
    """A finite table of rows."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Row]:
        """All rows in order, as a stream."""
        ...

    def row(self, index: int) -> Row:
        """Row `index`, from 0."""
        ...

    def place(self, index: int) -> str:
        """Where row `index` stands, for an error message."""
        ...


class JsonlRows:
    """One JSON object a line; blank lines are skipped. Only the lines' offsets (8 bytes each) are held in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets, self._line_numbers = array("Q"), array("Q")
        offset = 0
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._offsets.append(offset)
                    self._line_numbers.append(number)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[Row]:
        with _open(self.path) as file:
            lines = (line for line in file if line.strip())
            for index, line in enumerate(lines):
                yield self._parse(index, line)

    def row(self, index: int) -> Row:
        """Row `index`; UserError with the line's number if it is not a JSON object."""
        with _open(self.path) as file:
            file.seek(self._offsets[index])
            return self._parse(index, file.readline())

    def place(self, index: int) -> str:
        """Path, line from 1, row from 0."""
        return f"{self.path}, line {self._line_numbers[index]} (row {index})"

    def _parse(self, index: int, line: bytes) -> Row:
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.place(index)}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            hint = "; this looks like a JSON array, write one object a line instead" if isinstance(row, list) else ""
            raise UserError(f"{self.place(index)}: a {type(row).__name__} where a JSON object is needed{hint}")
        return row


class TableRows:
    """Rows of a memory-mapped `datasets.Dataset`."""

    def __init__(self, dataset: Dataset, label: str) -> None:
        self._dataset, self._label = dataset, label

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Row]:
        for table in self._dataset.with_format("arrow").iter(batch_size=1000):
            yield from table.to_pylist()  # pyright: ignore[reportAttributeAccessIssue]

    def row(self, index: int) -> Row:
        """Row `index` as Python values."""
        return self._dataset[index]

    def place(self, index: int) -> str:
        """Path and row from 0."""
        return f"{self._label}, row {index}"


def read_jsonl(path: Path) -> Rows:
    """Rows of a JSONL file."""
    return JsonlRows(_existing(path))


def read_parquet(path: Path) -> Rows:
    """Rows of a Parquet file, or of all `*.parquet` files of a folder in the order of their names."""
    files = sorted(_existing(path).glob("*.parquet")) if path.is_dir() else [_existing(path)]
    if not files:
        raise UserError(f"{path}: the folder has no *.parquet file")
    datasets = _datasets()
    with _named_failure(path, "Parquet"):
        return TableRows(datasets.Dataset.from_parquet([str(file) for file in files]), str(path))


def read_hf(path: Path, split: str) -> Rows:
    """One split of a local Hugging Face dataset: saved by `save_to_disk`, or a folder of data files as on the Hub."""
    if not _existing(path).is_dir():
        raise UserError(f"{path}: a Hugging Face dataset is a folder; for one file use source 'jsonl' or 'parquet'")
    datasets = _datasets()
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    with _named_failure(path, "a Hugging Face dataset"):
        loaded = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    if isinstance(loaded, datasets.Dataset):
        return TableRows(loaded, str(path))
    if split not in loaded:
        raise UserError(f"{path}: there is no split {split!r}; the splits are {quoted(list(loaded))}")
    return TableRows(loaded[split], f"{path} ({split})")


def quoted(names: Sequence[str]) -> str:
    """Names for a message: 'a', 'b'."""
    return ", ".join(repr(name) for name in names) or "none"


@contextmanager
def _named_failure(path: Path, kind: str) -> Iterator[None]:
    """Turns what the datasets library raises on broken files into a UserError that names the path."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (ValueError, OSError, DatasetsError) as error:
        raise UserError(f"{path}: can't be read as {kind}: {error.__cause__ or error}") from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("reading Parquet and Hugging Face datasets needs the package 'datasets': install it") from error
    datasets.disable_progress_bars()
    return datasets


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder (from the folder {Path.cwd()})")
    return path


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
