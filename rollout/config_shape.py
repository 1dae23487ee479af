"""The shape of a config model, pydantic or dataclass: its fields, its tables, and the reference made from them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Union

import annotated_types
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

NONE_WORD = "null"
REQUIRED = "(required)"


class FieldRow(NamedTuple):
    """One line of the reference: dotted path (`<n>` list index, `<name>` table key), type, default, description."""

    path: str
    type: str
    default: str
    description: str


class Field(NamedTuple):
    """A field of a pydantic model or a dataclass, seen the same way."""

    annotation: Any
    default: Any  # PydanticUndefined where the field is required
    description: str
    constraints: Sequence[Any]


def describe(model_cls: type[BaseModel]) -> list[FieldRow]:
    """Every field that a config file can set, depth first, in the order of definition."""
    return list(_describe(model_cls, ""))


def fields_of(cls: type) -> dict[str, Field]:
    """Fields of a model or a dataclass by the name that a config file uses."""
    if issubclass(cls, BaseModel):
        found = {}
        for name, info in cls.model_fields.items():
            default = info.get_default(call_default_factory=True, validated_data={})
            found[info.alias or name] = Field(info.annotation, default, info.description or "", info.metadata)
        return found
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):
        default: Any = PydanticUndefined
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        annotation, constraints = hints[field.name], ()
        if typing.get_origin(annotation) is typing.Annotated:
            annotation, *constraints = typing.get_args(annotation)
        found[field.name] = Field(annotation, default, field.metadata.get("description", ""), constraints)
    return found


def _is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation))


def tables_of(annotation: Any) -> list[type]:
    """The models that a value may be: the annotation itself, or members of a union."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [table for arm in typing.get_args(annotation) for table in tables_of(arm)]
    return [annotation] if _is_table(annotation) else []


def item_type(annotation: Any) -> Any:
    """What a list holds, or a table by free names; None where there is no such thing."""
    for arm in _arms(annotation):
        origin, args = typing.get_origin(arm), typing.get_args(arm)
        if origin in (list, tuple, set, frozenset, Sequence) and args:
            return args[0]
        if origin in (dict, Mapping) and len(args) == 2:
            return args[1]
    return None


def _arms(annotation: Any) -> list[Any]:
    """The members of a union, or the annotation alone; `Annotated` is looked through."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [inner for arm in typing.get_args(annotation) for inner in _arms(arm)]
    return [annotation]


def field_of(annotation: Any, name: str) -> Field | None:
    for table in tables_of(annotation):
        if field := fields_of(table).get(name):
            return field
    return None


def plain(value: Any) -> Any:
    """A default value as the plain lists and dicts that a TOML file would have given."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _describe(cls: type, prefix: str) -> Iterator[FieldRow]:
    for name, field in fields_of(cls).items():
        path = prefix + name
        tables = tables_of(field.annotation)
        item = item_type(field.annotation)
        if not tables or type(None) in _arms(field.annotation):
            yield FieldRow(path, _type_text(field), _default_text(field.default), field.description)
        for table in tables:
            yield from _describe(table, f"{path}.")
        slot = "<name>" if any(typing.get_origin(arm) in (dict, Mapping) for arm in _arms(field.annotation)) else "<n>"
        for table in tables_of(item):
            yield from _describe(table, f"{path}.{slot}.")


def _type_text(field: Field) -> str:
    bounds = {annotated_types.Ge: ">=", annotated_types.Gt: ">", annotated_types.Le: "<=", annotated_types.Lt: "<"}
    text = _annotation_text(field.annotation)
    for constraint in field.constraints:
        if sign := bounds.get(type(constraint)):
            text += f" {sign} {getattr(constraint, type(constraint).__name__.lower())}"
    return text


def _annotation_text(annotation: Any) -> str:
    arms = _arms(annotation)
    if len(arms) > 1:
        return " | ".join(_annotation_text(arm) for arm in arms)
    annotation = arms[0]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(repr(arg) for arg in args)
    if annotation is type(None):
        return NONE_WORD
    if annotation is Ellipsis:
        return "..."
    if _is_table(annotation):
        return "table"
    name = getattr(origin or annotation, "__name__", str(annotation)).lower()
    return f"{name}[{', '.join(_annotation_text(arg) for arg in args)}]" if args else name


def _default_text(default: Any) -> str:
    if default is PydanticUndefined:
        return REQUIRED
    if default is None:
        return NONE_WORD
    return short(plain(default)) if not isinstance(default, bool) else str(default).lower()


def short(value: Any) -> str:
    """`repr(value)`, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
