r"""Where a completion holds its program: in a fence after the thinking, or bare.

A fence is a line of three or more backticks or tildes with an optional tag, closed by a line of at least as many, or
by the end of the text; an indented one, as in a list, is moved to the left. Of several fences one is taken: those
tagged with the language asked for come first, then those of any language of programs (a shell's last, as it mostly
shows how to start the program), then untagged ones; fences with any other tag (text, json, output) are no programs.
Among them the last that defines the function under test, where one is named and any does; otherwise the last (by
option: the first, or all joined). Without fences, or if the text as a whole is Python, the whole text after the last
`</think>` is the program.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from verifiers.code.languages import ALIASES

Several = Literal["last", "first", "join"]
MAX_PROGRAM_CHARS = 1_000_000
_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([^\n`]*)")
_BYTE_ORDER_MARK = "\ufeff"


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
    margin, mark, tag, body = "", "", "", []
    for line in text.splitlines(keepends=True):
        match = _FENCE.fullmatch(line.rstrip())
        if not mark:
            if match is not None:
                margin, mark, tag, body = match[1], match[2], match[3].strip(), []
        elif match is not None and _closes(match, margin, mark):
            found.append(_Fence(tag, "".join(body)))
            mark = ""
        else:
            body.append(line.removeprefix(margin))
    if mark and "".join(body).strip():  # cut off before the closing line
        found.append(_Fence(tag, "".join(body)))
    return found


def _closes(match: re.Match[str], margin: str, mark: str) -> bool:
    return match[2].startswith(mark) and not match[3].strip() and len(match[1]) <= len(margin) + 3


def _language(tag: str) -> str | None:
    word = re.split(r"[\s,{}:;]", tag.lstrip("{.").lower(), maxsplit=1)[0]
    return ALIASES.get(word)


def extract_program(
    completion: str, names: Sequence[str] = (), several: Several = "last", language: str | None = None
) -> Program | None:
    """The program that `completion` holds, or None; `names` are functions under test, `language` the one asked for.

    At most `MAX_PROGRAM_CHARS` characters.
    """
    text = completion.rpartition("</think>")[2].replace("\r\n", "\n").lstrip(_BYTE_ORDER_MARK)
    if len(text) > MAX_PROGRAM_CHARS:
        return None
    fences = _fences(text)
    if not fences or _is_python(text):  # (a text that is Python has its fences in texts and comments)
        return Program(text, None, False) if text.strip() else None
    chosen = _candidates(fences, language)
    if not chosen:
        return None
    if several == "join":
        tagged_as = _language(chosen[-1].tag)
        return Program("\n".join(each.body for each in chosen if _language(each.tag) == tagged_as), tagged_as, True)
    defines = [fence for fence in chosen if any(_defines(fence.body, name) for name in names)]
    fence = (defines or chosen)[-1 if several == "last" else 0]
    return Program(fence.body.removeprefix(_BYTE_ORDER_MARK), _language(fence.tag), True)


def _candidates(fences: list[_Fence], language: str | None) -> list[_Fence]:
    tagged = [fence for fence in fences if _language(fence.tag)]
    untagged = [fence for fence in fences if not fence.tag]
    asked_for = [fence for fence in tagged if _language(fence.tag) == language]
    no_shell = [fence for fence in tagged if _language(fence.tag) != "bash"]
    return asked_for or no_shell or (untagged if language else []) or tagged or untagged


def _is_python(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _defines(body: str, name: str) -> bool:
    last = re.escape(name.rpartition(".")[2])
    return bool(
        re.search(rf"\b(?:def|function|fn|func|class|const|let|var)\s+{last}\b|^\s*{last}\s*=", body, re.MULTILINE)
    )
