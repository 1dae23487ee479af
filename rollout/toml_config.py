"""Config files: TOML and dotted overrides into a frozen pydantic model, every mistake named by its path, all at once.

A file may build on others: `extends = "other.toml"` or a list of files at its top, each looked for beside the file that
says it, then in the working directory. Later values win: the extended files in order, the file itself, the overrides in
order. Tables are merged key by key, everything else (lists too) is replaced. An override `extends=other.toml` puts that
file's values on top of all that comes before it.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rollout.config_shape import NONE_WORD, describe, field_of, fields_of, item_type, plain, short, tables_of
from rollout.errors import UserError

__all__ = ["describe", "load_config", "to_toml"]

T = TypeVar("T", bound=BaseModel)
EXTENDS = "extends"
_WRONG_KEY_TYPES = {"extra_forbidden", "unexpected_keyword_argument"}


def load_config(model_cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Read `path`, apply `key.sub=value` overrides, validate; UserError lists every mistake with its path."""
    layers = _Layers(Path(path))
    for override in overrides:
        layers.override(override, model_cls)
    unknown = dict(_unknown_keys(model_cls, layers.data))
    problems = [f"{place}: {text}{layers.source(place)}" for place, text in unknown.items()]
    try:
        config = model_cls.model_validate(layers.data)
    except ValidationError as error:
        rendered = _render_errors(error.errors(include_url=False), layers.data, unknown.keys())
        problems += [f"{place or 'config'}: {text}{layers.source(place)}" for place, text in rendered.items()]
    else:
        if not problems:
            return config
    origin = f"{path} with {' '.join(overrides)}" if overrides else str(path)
    count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    raise UserError("\n  ".join([f"{origin}: {count}", *problems]))


def to_toml(config: BaseModel) -> str:
    """The resolved config as TOML that loads to the same model; fields that are None are left out."""
    text = tomli_w.dumps(_without_none(config.model_dump(mode="json"), ""))
    if type(config).model_validate(tomllib.loads(text)) != config:
        raise ValueError("this config changes when it is written as TOML: is a field None whose default is not?")
    return text


class _Layers:
    """The values of a file and of all that it extends, later ones over earlier ones, and which file each is from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {}
        self._sources: dict[str, Path] = {}
        self._add(path, ())

    def override(self, override: str, model_cls: type[BaseModel]) -> None:
        """Apply one `key=value`; `extends=FILE` adds that file on top."""
        key, equals, text = override.partition("=")
        if key.strip() == EXTENDS and equals:
            for base in _extended_files(_parse_value(text), f"override {override!r}", Path()):
                self._add(base, ())
            return
        _apply_override(self.data, override, model_cls)
        self._set_source(key.strip(), self.path)

    def source(self, place: str) -> str:
        """`, in FILE` where a value, or every value of a table, is from one file and that is not the config's own."""
        below = {path for other, path in self._sources.items() if other.startswith(f"{place}.")}
        parts = place.split(".")
        above = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
        at = next((self._sources[other] for other in above if other in self._sources), self.path)
        found = below or {at}
        return f", in {found.pop()}" if len(found) == 1 and found != {self.path} else ""

    def _add(self, path: Path, chain: tuple[Path, ...]) -> None:
        if path.resolve() in [other.resolve() for other in chain]:
            names = " -> ".join(str(other) for other in (*chain, path))
            raise UserError(f"{path}: {EXTENDS} goes round in a circle: {names}")
        data = _read_toml(path, f", which {chain[-1]} {EXTENDS}" if chain else "")
        if EXTENDS in data:
            for base in _extended_files(data.pop(EXTENDS), str(path), path.parent):
                self._add(base, (*chain, path))
        self._merge(self.data, data, path, "")

    def _merge(self, low: dict[str, Any], high: dict[str, Any], path: Path, prefix: str) -> None:
        for key, value in high.items():
            if isinstance(value, dict):
                if not isinstance(low.get(key), dict):
                    low[key] = {}
                self._merge(low[key], value, path, f"{prefix}{key}.")
            else:
                low[key] = value
                self._set_source(prefix + key, path)

    def _set_source(self, place: str, path: Path) -> None:
        for stale in [other for other in self._sources if other.startswith(f"{place}.")]:
            del self._sources[stale]
        self._sources[place] = path


def _extended_files(value: Any, where: str, folder: Path) -> list[Path]:
    """The files that `extends` names, beside the file that says so or else in the working directory."""
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{where}: {EXTENDS} must be the path of a config file or a list of such paths, not {value!r}")
    return [folder / name if (folder / name).is_file() else Path(name) for name in names]


def _read_toml(path: Path, said_by: str = "") -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = sorted(file.name for file in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1) or siblings[:1]
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{path}: there is no such config file{said_by}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as a config file: {error}") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error


def _parse_value(text: str) -> Any:
    """A TOML value, None for `null`, else the text itself (a bare word needs no quotes)."""
    if text.strip() == NONE_WORD:
        return None
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def _apply_override(data: dict[str, Any], override: str, model_cls: type[BaseModel]) -> None:
    """Set one dotted key of `data` in place; a list that the file leaves out starts from the model's default."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"override {override!r}: write key=value or table.key=value, for instance seed=7")
    node: Any = data
    annotation: Any = model_cls
    for depth, part in enumerate(parts):
        place = ".".join(parts[: depth + 1])
        last = depth == len(parts) - 1
        index = _index(node, part, place, override)
        if last:
            node[index] = _parse_value(text)
            return
        field = field_of(annotation, part)
        annotation = field.annotation if field else item_type(annotation)
        if isinstance(node, dict) and index not in node:
            default = field.default if field else None
            node[index] = plain(default) if parts[depth + 1].isdigit() and isinstance(default, list | tuple) else {}
        node = node[index]


def _index(node: Any, part: str, place: str, override: str) -> Any:
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        parent = place.rpartition(".")[0]
        raise UserError(f"override {override!r}: {parent} is the value {node!r}, not a table, so {place} can't be set")
    if not part.isdigit() or int(part) >= len(node):
        parent = place.rpartition(".")[0]
        raise UserError(f"override {override!r}: {parent} is a list of {len(node)}; its items are numbered from 0")
    return int(part)


def _unknown_keys(root: type[BaseModel], data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Place and hint of each key that no model at its place has, with the nearest that exists anywhere in the config."""
    known = [row.path for row in describe(root)]
    known += sorted({path.rpartition(".")[0] for path in known} - {""})

    def walk(annotation: Any, value: Any, path: str) -> Iterator[tuple[str, str]]:
        tables = tables_of(annotation)
        if isinstance(value, Mapping) and tables:
            fields = {name: field for table in tables for name, field in fields_of(table).items()}
            for key, inner in value.items():
                place = f"{path}.{key}" if path else key
                if key in fields:
                    yield from walk(fields[key].annotation, inner, place)
                else:
                    siblings = [*fields] if path else [*fields, EXTENDS]
                    yield place, f"unknown key{_nearest(place, siblings, known)}"
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                yield from walk(item_type(annotation), inner, f"{path}.{key}")
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                yield from walk(item_type(annotation), inner, f"{path}.{index}")

    yield from walk(root, data, "")


def _nearest(place: str, siblings: Sequence[str], known: Sequence[str]) -> str:
    """The hint for an unknown key: a sibling, else the same or a similar name elsewhere, else what the table admits."""
    parent, _, name = place.rpartition(".")
    if near := difflib.get_close_matches(name, siblings, n=1):
        return f"; did you mean {parent + '.' if parent else ''}{near[0]}?"
    by_name = {path.rpartition(".")[2]: path for path in reversed(known)}
    if near := difflib.get_close_matches(name, list(by_name), n=1, cutoff=0.7):
        return f"; did you mean {by_name[near[0]]}?"
    return f"; known here: {', '.join(siblings)}"


def _render_errors(errors: Sequence[ErrorDetails], data: Any, unknown: Collection[str]) -> dict[str, str]:
    """pydantic's errors as path and `what is wrong (got ...)`; the arms of a union at one path become one line."""
    reasons: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    for error in errors:
        path = _path_in(data, error)
        if error["type"] in _WRONG_KEY_TYPES and path in unknown:
            continue
        if error["type"] in {"missing", "missing_argument"}:
            reason = "is missing and has no default"
        else:
            reason = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
            reason = "should be " + reason.removeprefix("Input should be ") if "Input should be " in reason else reason
            if not isinstance(error["input"], dict | BaseModel):
                got[path] = f" (got {short(error['input'])})"
        if reason not in reasons.setdefault(path, []):
            reasons[path].append(reason)
    return {path: f"{', or '.join(lines)}{got.get(path, '')}" for path, lines in reasons.items()}


def _path_in(data: Any, error: ErrorDetails) -> str:
    """The error's place as a path in the file: pydantic's names of union arms and validators are not part of it."""
    parts: list[str] = []
    node = data
    for position, part in enumerate(error["loc"]):
        is_missing = error["type"] in {"missing", "missing_argument"} and position == len(error["loc"]) - 1
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        elif not is_missing:
            continue
        parts.append(str(part))
    return ".".join(parts)


def _without_none(value: Any, path: str) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v, f"{path}.{k}" if path else k) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        if None in value:
            raise ValueError(f"{path}: a list that holds None can't be written as TOML")
        return [_without_none(item, f"{path}.{index}") for index, item in enumerate(value)]
    return value
