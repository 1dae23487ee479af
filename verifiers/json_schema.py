"""`json_schema`: the answer is a JSON document that fits a schema."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError as InvalidSchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from verifiers.calling import broken
from verifiers.extract import after_thinking, last_answer_block
from verifiers.registry import register
from verifiers.verdict import GoldAudit, TaskLike, Verdict

MAX_JSON_CHARS = 200_000
MAX_DEPTH = 100
MAX_EXTRACTED_CHARS = 500
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[^\n]*$", re.MULTILINE)


class NotJsonError(ValueError):
    """The text is not one JSON document within the bounds; the message says why."""


class SchemaError(ValueError):
    """The schema itself is unusable."""


@register("json_schema")
@dataclass(frozen=True)
class JsonSchema:
    """1 if the stated JSON fits the schema, else 0; `unparsable` if none is stated or it is not JSON.

    The schema is the option, or `task.answer` (an object, or JSON text). The document stands after the thinking: in the
    last `<answer>` block or all of the text; there in the last fenced block, or bare, with nothing else around it.
    Duplicate keys, NaN and infinities are not JSON; neither is more than 200,000 characters or 100 levels.
    Drafts go by `$schema` (default 2020-12); `$ref` never loads anything from outside the schema.
    """

    schema: Mapping[str, Any] | None = None
    check_formats: bool = False
    _validator: Validator | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if self.schema is not None:
            try:
                object.__setattr__(self, "_validator", self._make(json.dumps(self.schema)))
            except (SchemaError, TypeError) as exc:
                raise ValueError(f"the option schema is unusable: {exc}") from exc

    def __call__(self, completion: str, task: TaskLike) -> Verdict:
        try:
            validator = self._for(task)
        except SchemaError as exc:
            return broken(f"the schema is unusable: {exc}")
        stated = stated_json(completion)
        if not stated:
            return Verdict(score=0.0, status="unparsable", reason="the answer is empty")
        shown = stated[:MAX_EXTRACTED_CHARS]
        try:
            document = parse_json(stated)
        except NotJsonError as exc:
            return Verdict(score=0.0, status="unparsable", reason=f"not JSON: {exc}", extracted=shown)
        try:
            fault = next(iter(validator.iter_errors(document)), None)
        except Unresolvable as exc:
            return broken(f"the schema refers to {exc.ref!r}, which is not in it")
        except RecursionError:
            return broken("the schema recurses without end")
        if fault is None:
            return Verdict(score=1.0, status="correct", reason="it fits the schema", extracted=shown)
        reason = f"at {fault.json_path[:200]}: {fault.message[:300]}"
        return Verdict(score=0.0, status="wrong", reason=reason, extracted=shown)

    def prepare(self, task: TaskLike) -> GoldAudit:
        """Whether there is a schema, and a valid one."""
        try:
            self._for(task)
        except SchemaError as exc:
            return GoldAudit(status="missing" if task.answer is None else "unparsable", reason=str(exc))
        return GoldAudit(status="ok", reason="a valid schema")

    def _for(self, task: TaskLike) -> Validator:
        if self._validator is not None:
            return self._validator
        schema = task.answer
        if not isinstance(schema, str):
            try:
                schema = json.dumps(schema)
            except (TypeError, ValueError) as exc:
                raise SchemaError(f"it is not JSON: {exc}") from exc
        return self._make(schema)

    def _make(self, schema: str) -> Validator:
        return _validator(schema, self.check_formats)


@functools.lru_cache(maxsize=256)
def _validator(schema: str, check_formats: bool) -> Validator:
    try:
        value = parse_json(schema)
    except NotJsonError as exc:
        raise SchemaError(f"it is not JSON: {exc}") from exc
    if isinstance(value, bool):
        value = {} if value else {"not": {}}
    if not isinstance(value, dict):
        raise SchemaError(f"it is a {type(value).__name__}, not an object")
    cls = validator_for(value, default=Draft202012Validator)
    try:
        cls.check_schema(value)
    except InvalidSchemaError as exc:
        raise SchemaError(f"at {exc.json_path}: {exc.message[:300]}") from exc
    checker = cls.FORMAT_CHECKER if check_formats else None
    # A registry of its own: the default one fetches addresses that a schema refers to.
    return cls(value, registry=Registry(), format_checker=checker)


def stated_json(completion: str) -> str:
    """The text that should be the JSON document: see `JsonSchema`."""
    text = after_thinking(completion)
    block = last_answer_block(text)
    text = text if block is None else block
    fences = list(_FENCE.finditer(text))
    if len(fences) >= 2:
        opening, closing = fences[-2:] if len(fences) % 2 == 0 else fences[-3:-1]
        text = text[opening.end() : closing.start()]
    return text.strip()


def parse_json(text: str) -> Any:
    """One JSON document, strictly; raises `NotJsonError`."""
    if len(text) > MAX_JSON_CHARS:
        raise NotJsonError(f"{len(text)} characters are more than {MAX_JSON_CHARS}")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
    except NotJsonError:
        raise
    except RecursionError as exc:
        raise NotJsonError(f"it is nested more than {MAX_DEPTH} deep") from exc
    except ValueError as exc:
        raise NotJsonError(str(exc)[:200]) from exc
    if _deeper_than(value, MAX_DEPTH):
        raise NotJsonError(f"it is nested more than {MAX_DEPTH} deep")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise NotJsonError("an object has the same key twice")
    return value


def _refuse(name: str) -> Any:
    raise NotJsonError(f"{name} is no JSON value")


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return False
    return True
