"""What is to be known of a gold answer before anything is judged by it."""

from __future__ import annotations

import re
from numbers import Real
from typing import Any

from verifiers.mathematics.compare import read_answer
from verifiers.mathematics.exact import written
from verifiers.mathematics.expr import MathSyntaxError, TooLargeError
from verifiers.mathematics.notation import normalise
from verifiers.mathematics.parser import parse
from verifiers.mathematics.text import is_prose
from verifiers.verdict import GoldAudit

_BOX = re.compile(r"\\boxed\s*\{")
_DIGIT = re.compile(r"\d")
_GROUPS = re.compile(r"\d{1,3}(,\d{3}){2,}|\d{1,3},\d{3}\s*,")


def gold_text(gold: Any) -> str | None:
    r"""The gold answer as text: a number's shortest form, what follows `####`, the content of its `\boxed{}`; None for none."""
    if isinstance(gold, bool) or gold is None:
        return None
    if isinstance(gold, Real):
        return written(gold) if isinstance(gold, int) else str(gold)
    if not isinstance(gold, str):
        return None
    text = gold.rpartition("####")[2] if "####" in gold else gold
    if _BOX.search(text):
        from verifiers.extract import stated_answer

        stated = stated_answer(text)
        if stated.text is not None:
            text = stated.text
    return text.strip() or None


def audit_gold(gold: Any) -> GoldAudit:
    """`ok`, or why a verdict by this gold could be wrong."""
    text = gold_text(gold)
    if text is None:
        return GoldAudit(status="missing", reason="there is no gold answer")
    try:
        answer = parse(text)
    except TooLargeError as exc:
        return GoldAudit(status="unparsable", reason=str(exc))
    except MathSyntaxError as exc:
        return _unread(text, str(exc))
    if _GROUPS.search(answer.text) and answer.tree.op == "num":
        return GoldAudit(status="ambiguous", reason="its commas group digits or separate numbers", parsed=answer.text)
    return GoldAudit(status="ok", reason=f"a {answer.tree.op}", parsed=answer.text)


def _unread(text: str, reason: str) -> GoldAudit:
    if _DIGIT.search(normalise(text)):
        return GoldAudit(status="embedded_number", reason=f"{reason}; it holds a number that is not the answer")
    if is_prose(text):
        found, _ = read_answer(text)
        return GoldAudit(status="ok", reason="words", parsed=found.text if found else None)
    return GoldAudit(status="unparsable", reason=reason)
