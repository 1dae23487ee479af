"""The reference of a config's fields on the terminal, from the models themselves."""

from __future__ import annotations

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rollout.toml_config import describe


def print_fields(model: type[BaseModel], console: Console | None = None) -> None:
    """Print path, type, default and description of every field of `model`, a blank line between its tables."""
    table = Table(
        title=f"{model.__name__}: {model.__doc__ or ''}".rstrip(": "), title_justify="left", box=None, pad_edge=False
    )
    for heading in ("field", "type", "default", "description"):
        table.add_column(heading, overflow="fold")
    section = ""
    for row in describe(model):
        if (parent := row.path.rpartition(".")[0]) != section:
            section = parent
            table.add_row()
        table.add_row(Text(row.path, "bold"), Text(row.type, "cyan"), Text(row.default), Text(row.description))
    (console or Console()).print(table)
