"""The trained tokenizer: any text comes back, numbers are pairs, tags are one token, transformers can load it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.arithmetic import generate_documents
from rollout.errors import UserError
from rollout.records import Task
from rollout.templates import R1_ZERO, render
from rollout.tokenizer import END, PAD, TAGS, load_tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers")

BEFORE, _, AFTER = R1_ZERO.partition("{question}")
CHAT = f"{{{{ {BEFORE!r} + messages[-1]['content'] + {AFTER!r} }}}}"
TEXTS = [f"{BEFORE}{task.prompt}{AFTER}{task.answer}" for task in generate_documents(0, "train", 0, 200)]
TOKENIZER: Any = train_tokenizer(TEXTS, 512, CHAT)


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def plain_pieces(text: str) -> list[str]:
    return [TOKENIZER.decode([token]) for token in encode(text)]


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
        | st.sampled_from([*TAGS, " ", "\n\n", "12", END]),
        max_size=8,
    ).map("".join)
)
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(encode(text)) == text
    assert all(0 <= token < len(TOKENIZER) for token in encode(text))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.text("0123456789 +*=()<>aß٣é\n", max_size=30) | st.integers(0, 10**12).map(str))
def test_numbers_are_pairs_of_digits_from_the_right(text: str) -> None:
    pairs = []
    for number in re.findall("[0-9]+", text):
        odd = len(number) % 2
        pairs += [number[:odd]] * odd + [number[place : place + 2] for place in range(odd, len(number), 2)]
    assert [piece for piece in plain_pieces(text) if re.search("[0-9]", piece)] == pairs


def test_every_pair_is_a_token_and_none_mixes_digits_with_something_else() -> None:
    pieces = [TOKENIZER.decode([token]) for token in range(len(TOKENIZER))]
    numbers = {piece for piece in pieces if re.search("[0-9]", piece)}
    assert numbers == {str(digit) for digit in range(10)} | {f"{pair:02d}" for pair in range(100)}


def test_pairs_that_no_text_holds_are_tokens_too() -> None:
    tokenizer: Any = train_tokenizer(["no number at all"] * 50, 400, CHAT)
    assert all(len(tokenizer(f"{pair:02d}", add_special_tokens=False)["input_ids"]) == 1 for pair in range(100))


@pytest.mark.parametrize("tag", [*TAGS, END, PAD])
def test_tags_and_ends_are_single_tokens_wherever_they_stand(tag: str) -> None:
    (token,) = encode(tag)
    for text in (f"x{tag}", f"{tag}1{tag}", f"\n{tag} {tag}\n"):
        assert encode(text).count(token) == text.count(tag)


def test_tags_are_kept_where_end_and_pad_are_skipped() -> None:
    text = f"<think>\n1+1</think> <answer>2</answer>{END}{PAD}"
    assert TOKENIZER.decode(encode(text), skip_special_tokens=True) == text.removesuffix(END + PAD)
    assert (TOKENIZER.eos_token, TOKENIZER.pad_token) == (END, PAD)
    assert encode(END) == [TOKENIZER.eos_token_id]
    assert encode(PAD) == [TOKENIZER.pad_token_id]


def test_the_prompt_that_every_text_repeats_costs_few_tokens() -> None:
    prompt = BEFORE + "37 + 48 * 2" + AFTER
    assert len(encode(prompt)) < 40 < len(prompt) / 5


def test_the_vocabulary_is_within_its_limit_and_training_is_deterministic() -> None:
    assert 256 + 6 + 100 < len(TOKENIZER) <= 512
    again: Any = train_tokenizer(TEXTS, 512, CHAT)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(len(TOKENIZER)))


def test_transformers_loads_what_was_saved(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    for loaded in (
        transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True),
        load_tokenizer(tmp_path),
    ):
        assert loaded.get_vocab() == TOKENIZER.get_vocab()
        assert (loaded.eos_token_id, loaded.pad_token_id) == (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)
        assert loaded.chat_template == CHAT
        for text in (TEXTS[3], f"<think>é ٣ 007</think>{END}"):
            ids = loaded(text, add_special_tokens=False)["input_ids"]
            assert ids == encode(text)
            assert loaded.decode(ids) == text
            assert loaded.decode(ids, skip_special_tokens=True) == text.removesuffix(END)


def test_the_chat_template_renders_the_prompt_template() -> None:
    question = "37 + 48 * 2 {braces} {{ 'jinja' }}"
    task = Task(task_id="t", prompt=question, answer=1)
    rendered = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == render("r1_zero", task)


def test_a_folder_with_the_tokenizer_file_alone_is_enough(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    loaded: Any = load_tokenizer(tmp_path)
    assert loaded(TEXTS[0], add_special_tokens=False)["input_ids"] == encode(TEXTS[0])


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer\.json: save the tokenizer beside the weights"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "deepseek_v3"])
def test_a_saved_tokenizer_gives_the_same_ids_beside_any_model(tmp_path: Path, model_type: str) -> None:
    tokenizer = train_tokenizer(["Add 12 and 30: 12 + 30 = 42", "<think>so</think> <answer>42</answer>"], 300, "")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = load_tokenizer(tmp_path)
    for text in ("<think>\n1234 + 5 = ?</think> <answer>1239</answer>", "Add 12 and 30", "naïve 中文"):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
