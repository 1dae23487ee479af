"""Prompt templates: from a task to the text the policy continues."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rollout.errors import UserError
from rollout.records import Task

SLOT = "{question}"
CHAT = "chat"

R1_ZERO = (
    "A conversation between User and Assistant. User asks a question and Assistant answers it: it first reasons inside "
    "<think> </think>, then gives the answer inside <answer> </answer>.\nUser: {question}\nAssistant:"
)
"""The plain-text conversation of DeepSeek-R1-Zero (arXiv 2501.12948v1, Table 1), in our words."""

TEMPLATES: Mapping[str, str] = {"r1_zero": R1_ZERO, "plain": SLOT}

ChatTemplate = Callable[[Sequence[Mapping[str, str]]], str]
"""From chat messages to text that ends where the assistant's turn begins, as the tokenizer's chat template does."""


def check_template(template: str) -> str:
    """`template` itself if it is "chat", a built-in name, or a text with `{question}` once; otherwise a UserError."""
    if template == CHAT or template in TEMPLATES:
        return template
    count = template.count(SLOT)
    if count == 1:
        return template
    if count > 1:
        raise UserError(
            f"the prompt template contains {SLOT} {count} times, it must be there exactly once: {template!r}"
        )
    names = [*TEMPLATES, CHAT]
    nearest = difflib.get_close_matches(template, names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(
        f"prompt template {template!r} is neither a known name ({', '.join(names)}) nor a text with {SLOT} in it{hint}"
    )


def render(template: str, task: Task, *, chat_template: ChatTemplate | None = None) -> str:
    """The prompt text for `task`; the question is put in as it is, braces included.

    "chat" passes the messages (a text prompt becomes one user message) through `chat_template`. The others take a text
    prompt, or chat messages that are a single user message. Raises UserError naming the task otherwise.
    """
    check_template(template)
    if template == CHAT:
        if chat_template is None:
            raise UserError(
                "the template 'chat' needs a tokenizer with a chat template: use one, or 'r1_zero' or 'plain'"
            )
        return chat_template(
            [{"role": "user", "content": task.prompt}] if isinstance(task.prompt, str) else task.prompt
        )
    before, _, after = TEMPLATES.get(template, template).partition(SLOT)
    return before + _question(template, task) + after


def _question(template: str, task: Task) -> str:
    if isinstance(task.prompt, str):
        return task.prompt
    messages: Sequence[Mapping[str, Any]] = task.prompt
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    roles = ", ".join(message["role"] for message in messages)
    raise UserError(
        f"task {task.task_id} has chat messages ({roles}), which the template {template!r} cannot take: "
        "it needs a text or a single user message; use the template 'chat'"
    )
