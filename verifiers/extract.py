r"""Where a completion states its final answer: after the thinking, in `<answer>` tags, else in a `\boxed{}`."""

from __future__ import annotations

import re

MAX_BOX_SEARCH_CHARS = 100_000

_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def after_thinking(completion: str) -> str:
    """The text after the last `</think>`, or all of it if there is none."""
    return completion.rpartition("</think>")[2]


def last_answer_block(text: str) -> str | None:
    """The content of the last complete `<answer>..</answer>`, or None; linear in the text's length."""
    last_close = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(last_close, 0))
    if start < 0:
        return None
    start += len("<answer>")
    return text[start : text.index("</answer>", start)]


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{..}` whose braces balance, or None.

    Only the last `MAX_BOX_SEARCH_CHARS` characters are searched; escaped braces (`\{`) do not count.
    """
    text = text[-MAX_BOX_SEARCH_CHARS:]
    open_braces: list[tuple[bool, int]] = []
    best: tuple[int, int] | None = None
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token == "}":
            if open_braces:
                is_box, start = open_braces.pop()
                if is_box and (best is None or start > best[0]):
                    best = (start, match.start())
        elif token.endswith("{") and token != r"\{":
            open_braces.append((len(token) > 1, match.end()))
    return None if best is None else text[best[0] : best[1]]


def final_answer(completion: str) -> str | None:
    r"""The stated answer: the last answer block after the thinking (unwrapped if it holds a box), else the last box."""
    text = after_thinking(completion)
    block = last_answer_block(text)
    if block is None:
        return last_boxed(text)
    boxed = last_boxed(block)
    return block if boxed is None else boxed
