r"""Where a completion states its final answer, and by which rule.

`stated_answer` reads what comes after the last `</think>`, up to the end of the turn. In order:

1. the last `<answer>` block;
2. the last box (`\boxed`, `\fbox`), unless a phrase "the final answer is .." comes after it: what is stated last counts.
   Boxes joined by nothing but commas, "and", "or" are one answer in parts (`boxes="last"`, the default); `"all"` joins
   every box of the text, `"single"` refuses a text with two different ones;
3. the last stated answer: "the final answer is ..", "answer: ..", ".. is the answer", "答案是 ..", "故选 ..", "#### ..";
4. a text that is nothing but a value (`\frac12`, `$x^2$`, `12 cm`), or whose last sentence concludes with one
   ("So the volume is 12");
5. with `last_number`, the last number of the text.

A text without any of these states no answer: no number is taken out of its reasoning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from verifiers import statements

MAX_BOX_SEARCH_CHARS = 100_000
MAX_GAP_CHARS = 120
MAX_BARE_CHARS = 4_000

BoxPolicy = Literal["last", "all", "single"]
Source = Literal["answer_tag", "box", "statement", "bare", "conclusion", "last_number", "none"]

_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_STATED_BOX_OR_BRACE = re.compile(r"(?P<box>\\{1,3}(?:boxed|fbox|framebox)\s*(?P<brace>\{)?)|\\.|[{}]", re.DOTALL)
_BOX_COMMAND = re.compile(r"\\{1,3}(?:boxed|fbox|framebox)(?![a-zA-Z])")
_BARE_BOX = re.compile(r"[-+]?\d[\d.,/]*|\\(?!(?:boxed|fbox|framebox)(?![a-zA-Z]))[a-zA-Z]+|[^\s{}$\\]")
_GAP = re.compile(
    r"(?:[\s,;、，；$&*~.:]|\\[()\[\],;:! ]|\\\\|\\q?quad\b|(?:and|or|和|或者?|与|及|以及)(?![a-z])"
    r"|\\(?:text|mbox|textrm|mathrm)\s*\{[\s,;]*(?:(?:and|or|for|part|in|case|\(?[a-dA-D1-9iv]{1,3}\)?)[\s,;]*){0,8}\})*",
)
_NAME_BEFORE = re.compile(r"([A-Za-z](?:_\w|_\{\w{1,8}\})?)\s*=\s*$")
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_TURN_END = re.compile(r"<\|(?:im_end|im_start|endoftext|end_of_text|eot_id|eom_id)\|>|</s>")
_ROLE = re.compile(r"\s*<\|im_start\|>\s*\w{0,20}\s")


@dataclass(frozen=True)
class Stated:
    """The stated answer as text (None: nothing is stated), by which rule it was found, and a reason to show."""

    text: str | None
    source: Source
    reason: str


@dataclass(frozen=True)
class _Box:
    start: int
    end: int
    text: str


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


def stated_answer(completion: str, *, last_number: bool = False, boxes: BoxPolicy = "last") -> Stated:
    """The final answer that `completion` states, by the rules at the top of this module; raises ValueError for `boxes`.

    A `<think>` that is never closed is thinking to the end, so that nothing after it is stated.
    """
    if boxes not in get_args(BoxPolicy):
        raise ValueError(f'boxes is {boxes!r}; it must be "last", "all" or "single"')
    text, _, unfinished = after_thinking(_own_turn(completion)).partition("<think>")
    block = _answer_block(text)
    if block is not None:
        inner = _by_rules(block, boxes)
        whole = inner.text if inner.source != "none" else statements.clean(block)
        if inner.text is None and (inner.source == "box" or not whole):
            return Stated(None, "answer_tag", inner.reason if whole else "the <answer> block is empty")
        return Stated(whole, "answer_tag", "the last <answer> block")
    found = _by_rules(text, boxes)
    if found.source == "none" and last_number and (number := statements.last_number(text)) is not None:
        return Stated(number, "last_number", "the last number of the text")
    if found.source == "none" and unfinished:
        return Stated(None, "none", "the <think> block is never closed, so nothing is stated after it")
    return found


def _own_turn(completion: str) -> str:
    """The completion up to the first end-of-turn token; the role marker that may open it is left out."""
    if opening := _ROLE.match(completion):
        completion = completion[opening.end() :]
    end = _TURN_END.search(completion)
    return completion[: end.start()] if end and completion[: end.start()].strip() else completion


def _answer_block(text: str) -> str | None:
    """The last complete `<answer>` block; failing that, what follows an `<answer>` that is cut off or ended by a stop."""
    opened: int | None = None
    complete: tuple[int, int] | None = None
    for tag in _ANSWER_TAG.finditer(text):
        if not tag.group(1):
            opened = tag.end()
        elif opened is not None:
            complete, opened = (opened, tag.start()), None
    if complete is not None:
        return text[complete[0] : complete[1]]
    return None if opened is None else text[opened:]


def _by_rules(text: str, policy: BoxPolicy) -> Stated:
    """Rules 2 to 4 of the module's list."""
    found, unclosed = _boxes(text)
    # what is stated before the last box gives way to it
    statement = statements.last_statement(text, found[-1].end if found else 0)
    if found:
        if statement is not None and statement.kind == "final":
            return Stated(statement.text, "statement", "the final answer stated after the last box")
        return _from_boxes(text, found, policy)
    if statement is not None:
        return Stated(statement.text, "statement", "the last stated answer")
    if unclosed:
        return Stated(None, "box", r"the \boxed{ is never closed")
    if (bare := _bare(text)) is not None:
        return Stated(bare, "bare", "the whole text is the answer")
    if (value := statements.concluding_value(text)) is not None:
        return Stated(value, "conclusion", "the value of the concluding sentence")
    return Stated(None, "none", r"no <answer>..</answer>, no \boxed{} and no stated answer")


def _boxes(text: str) -> tuple[list[_Box], bool]:
    r"""The outermost non-empty boxes in order, and whether a last one is never closed.

    The same bound as in `last_boxed`; `\boxed 5` holds one token.
    """
    offset = max(0, len(text) - MAX_BOX_SEARCH_CHARS)
    open_braces: list[tuple[int, int] | None] = []
    found: list[_Box] = []
    for token in _STATED_BOX_OR_BRACE.finditer(text, offset):
        if token["box"] and not token["brace"]:
            if bare := _BARE_BOX.match(text, token.end()):
                found.append(_Box(token.start(), bare.end(), bare.group().rstrip(".,")))
        elif token["box"] or token.group() == "{":
            open_braces.append((token.start(), token.end()) if token["box"] else None)
        elif token.group() == "}" and open_braces and (box := open_braces.pop()) is not None:
            while found and found[-1].start > box[0]:
                found.pop()
            found.append(_Box(box[0], token.end(), text[box[1] : token.start()]))
    kept = [box for box in found if box.text.strip(" \t\n$.")]
    unclosed = any(box is not None and (not kept or box[0] > kept[-1].start) for box in open_braces)
    return kept, unclosed


def _from_boxes(text: str, found: list[_Box], policy: BoxPolicy) -> Stated:
    if policy == "single" and len({_box_text(box) for box in found}) > 1:
        return Stated(None, "box", f"{len(found)} different boxes, where one is allowed")
    first = 0 if policy == "all" else len(found) - 1
    while policy == "last" and first > 0 and _joined(text, found[first - 1], found[first]):
        first -= 1
    parts = found[first:]
    names = [_NAME_BEFORE.search(text, max(0, box.start - 16), box.start) for box in parts]
    texts = [_box_text(box) for box in parts]
    if len(parts) > 1 and all(names):
        texts = [f"{name[1]} = {part}" for name, part in zip(names, texts, strict=True) if name]
    texts = list(dict.fromkeys(texts))
    reason = "the last box" if len(texts) == 1 else f"the last {len(texts)} boxes, as one answer in parts"
    return Stated(", ".join(texts), "box", reason)


def _box_text(box: _Box) -> str:
    """The content, without boxes and delimiters inside; what stands outside the box (a unit) is not part of it."""
    content = statements.clean(_BOX_COMMAND.sub("", box.text))
    if content != box.text.strip() and content.startswith("{") and content.endswith("}") and content.count("{") == 1:
        content = statements.clean(content[1:-1])
    return content


def _joined(text: str, left: _Box, right: _Box) -> bool:
    """Whether the text between two boxes only joins them: commas, "and", "or", names (`x = `)."""
    if right.start - left.end > MAX_GAP_CHARS:
        return False
    gap = text[left.end : right.start]
    name = _NAME_BEFORE.search(gap)
    return "\n\n" not in gap and _GAP.fullmatch(gap[: name.start()] if name else gap) is not None


def _bare(text: str) -> str | None:
    """The text itself if it is one short value: one line (or one displayed formula), few words, one sentence."""
    text = text.strip()
    if not text or len(text) > MAX_BARE_CHARS or statements.inline_breaks(text) or statements.EMPTY_BOX.search(text):
        return None
    if statements.num_words(text) > statements.MAX_BARE_WORDS:
        return None
    if len(statements.sentences(text)) != 1:
        return None
    sentence = statements.clean(statements.without_conclusion(text))
    return statements.reduce_prose(sentence) if sentence else None
