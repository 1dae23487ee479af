"""Texts that have broken verifiers: none of them states an answer, so none is ever correct."""

from __future__ import annotations

DEEP = 20_000

_PLAIN: tuple[str, ...] = (
    "",
    " ",
    "\n\n\t",
    "\0",
    "\x1b[31m\x07\x7f",
    "\ud800",
    "\ufeff\u200b\u202e\u2066",
    "🦆" * 50,
    "e\u0301" * 500,
    "None",
    "nan",
    "inf",
    "-inf",
    "undefined",
    "1/0",
    r"\frac{1}{0}",
    r"\frac{0}{0}",
    "?",
    "...",
    "I don't know.",
    "%s%s%n",
    "{0.__class__.__mro__}",
    "${7*7}",
    "__import__('os').system('exit 1')",
    "().__class__.__bases__[0].__subclasses__()",
    "[x for x in iter(int, 1)]",
    "while True: pass",
    "'; DROP TABLE answers; --",
    "../../../../etc/passwd",
)
_HUGE: tuple[str, ...] = (
    "9^9^9^9",
    "9**9**9**9",
    r"9^{9^{9^{9}}}",
    r"10^{10^{10}}",
    "1e999999999",
    r"(10^9)!",
    r"\binom{10^9}{5\cdot 10^8}",
    r"\sum_{k=1}^{10^{12}} \frac{1}{k}",
    r"\int_0^1 x^{x^{x}} dx",
    r"\sqrt{" * 300 + "2" + "}" * 300,
    "x^{1000}+" * 500 + "1",
    "(x+1)^{99999}",
    "7" * 100_000,
    "0." + "3" * 100_000,
)
_LONG: tuple[str, ...] = (
    "a" * 300_000,
    "a" * 50_000 + "!",
    " " * 300_000,
    "=" * 50_000,
    "," * 50_000,
    "and " * 50_000,
    "$" * 50_001,
    "\\" * 50_001,
    "`" * 50_001,
    "{" * DEEP,
    "}" * DEEP,
    "(" * DEEP,
    "[" * DEEP,
    "{" * DEEP + "}" * DEEP,
    "[" * DEEP + "]" * DEEP,
    "(" * DEEP + ")" * DEEP,
    '{"a":' * DEEP,
    r"\boxed{" * DEEP,
    r"\frac{1}{" * DEEP,
    r"\left(" * DEEP,
    r"\text{" * DEEP,
    r"\(" * DEEP,
    "<answer>" * DEEP,
    "</answer>" * DEEP,
    "<think>" * DEEP,
    "</think>" * DEEP,
    "```\n" * DEEP,
    "-" * DEEP,
    "the answer is " * 5_000,
)


def hostile_texts() -> list[str]:
    """Every text as it is; those without an answer's form also as a stated answer, in tags and in a box."""
    stated = [text for text in (*_PLAIN, *_HUGE) if text.strip()]
    wrapped = [f"<think>x</think><answer>{text}</answer>" for text in stated]
    boxed = [rf"So the answer is \boxed{{{text}}}." for text in stated]
    in_tags = [f"<think>x</think><answer>{text}</answer>" for text in _LONG]
    return [*_PLAIN, *_HUGE, *_LONG, *wrapped, *boxed, *in_tags]
