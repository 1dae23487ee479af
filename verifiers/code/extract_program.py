r"""Where a completion holds its program: in a fence after the thinking, or bare.

A fence is a line of three or more backticks or tildes with an optional tag, closed by a line of at least as many, or
by the end of the text. Of several fences one is taken: those tagged with a language of programs come before untagged
ones, and fences with any other tag (text, json, output) are no programs. Among them the last that defines the function
under test, where one is named and any does; otherwise the last (by option: the first, or all joined).
Without fences, the whole text after the last `</think>` is the program.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from verifiers.code.languages import ALIASES

Several = Literal["last", "first", "join"]
MAX_PROGRAM_CHARS = 1_000_000
_FENCE = re.compile(r"[ \t]{0,3}(`{3,}|~{3,})[ \t]*([^\n`]*)")


@dataclass(frozen=True)
class Program:
    """A program's source, its language by its tag (None without a tag), and whether it stood in a fence."""

    source: str
    language: str | None
    is_fenced: bool


@dataclass(frozen=True)
class _Fence:
    tag: str
    body: str


def _fences(text: str) -> list[_Fence]:
    found: list[_Fence] = []
    mark, tag, body = "", "", []
    for line in text.splitlines(keepends=True):
        match = _FENCE.fullmatch(line.rstrip())
        if not mark:
            if match is not None:
                mark, tag, body = match[1], match[2].strip(), []
        elif match is not None and match[1].startswith(mark) and not match[2].strip():
            found.append(_Fence(tag, "".join(body)))
            mark = ""
        else:
            body.append(line)
    if mark and "".join(body).strip():  # cut off before the closing line
        found.append(_Fence(tag, "".join(body)))
    return found


def _language(tag: str) -> str | None:
    word = re.split(r"[\s,{}:;]", tag.lstrip("{.").lower(), maxsplit=1)[0]
    return ALIASES.get(word)


def extract_program(completion: str, names: Sequence[str] = (), several: Several = "last") -> Program | None:
    """The program that `completion` holds, or None; `names` are functions under test. At most `MAX_PROGRAM_CHARS`."""
    text = completion.rpartition("</think>")[2].replace("\r\n", "\n")
    if len(text) > MAX_PROGRAM_CHARS:
        return None
    fences = _fences(text)
    if not fences:
        return Program(text, None, False) if text.strip() else None
    tagged = [fence for fence in fences if _language(fence.tag)]
    chosen = tagged or [fence for fence in fences if not fence.tag]
    if not chosen:
        return None
    if several == "join":
        language = _language(chosen[-1].tag)
        return Program("\n".join(each.body for each in chosen if _language(each.tag) == language), language, True)
    defines = [fence for fence in chosen if any(_defines(fence.body, name) for name in names)]
    fence = (defines or chosen)[-1 if several == "last" else 0]
    return Program(fence.body, _language(fence.tag), True)


def _defines(body: str, name: str) -> bool:
    last = re.escape(name.rpartition(".")[2])
    return bool(
        re.search(rf"\b(?:def|function|fn|func|class|const|let|var)\s+{last}\b|^\s*{last}\s*=", body, re.MULTILINE)
    )
