"""Prompt templates: what stands around the question, and that the question is left alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import UserError
from rollout.records import Task
from rollout.templates import check_template, render


def make_task(prompt):
    return Task(task_id="toy/7", prompt=prompt, answer=1)


@settings(deadline=None, derandomize=True)
@given(st.text(min_size=1))
def test_the_question_is_put_in_as_it_is(question):
    task = make_task(question)
    assert render("plain", task) == question
    assert render("Q: {question} {x}\n\\1 A:", task) == f"Q: {question} {{x}}\n\\1 A:"
    assert render("r1_zero", task).endswith(f"\nUser: {question}\nAssistant:")


@pytest.mark.parametrize("question", ["{question}", "{}", "{0}", "{{x}}", "\\frac{1}{2} %s"])
def test_braces_in_the_question_are_harmless(question):
    assert render("<{question}>", make_task(question)) == f"<{question}>"


def test_r1_zero_names_each_tag_and_ends_at_the_assistants_turn():
    text = render("r1_zero", make_task("1 + 1?"))
    for tag in ("<think>", "</think>", "<answer>", "</answer>", "User", "Assistant"):
        assert tag in text
    assert text.endswith("User: 1 + 1?\nAssistant:")
    assert "{" not in text


def test_chat_goes_through_the_callable():
    def chat(messages):
        return "|".join(f"{m['role']}:{m['content']}" for m in messages) + "|assistant:"

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert render("chat", make_task("Hi"), chat_template=chat) == "user:Hi|assistant:"
    assert render("chat", make_task(messages), chat_template=chat) == "system:Be brief.|user:Hi|assistant:"


def test_a_single_user_message_is_as_good_as_a_text():
    assert render("plain", make_task([{"role": "user", "content": "Hi"}])) == "Hi"


def test_a_conversation_needs_the_chat_template():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(UserError, match=r"toy/7 has chat messages \(system, user\)"):
        render("r1_zero", make_task(messages))
    with pytest.raises(UserError, match="chat template"):
        render("chat", make_task(messages))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("r1zero", "did you mean 'r1_zero'"),
        ("Answer this:", "neither a known name"),
        ("{question}{question}", "2 times"),
    ],
)
def test_a_template_without_exactly_one_slot_is_refused(template, message):
    with pytest.raises(UserError, match=message):
        check_template(template)
    with pytest.raises(UserError, match=message):
        render(template, make_task("Hi"))


def test_good_templates_pass_the_check():
    for template in ("r1_zero", "plain", "chat", "Q: {question}"):
        assert check_template(template) == template
