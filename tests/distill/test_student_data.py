"""From traces to tokens: what the student is given and writes, and that every trace is used or counted."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.student_batches import TraceBatches
from distill.student_config import StudentDataConfig
from distill.student_data import Encoder, TokenStore, open_store, without_opened_tag
from distill.trace import Trace, write_traces
from rollout.errors import UserError
from rollout.records import Task
from rollout.sampling import Prompter
from tests.distill.student_builders import CHAT, make_tokenizer, make_trace, make_traces

TOKENIZER = make_tokenizer()
END = TOKENIZER.eos_token_id


def encoder(path: Path = Path("unused"), template: str = "chat", tokenizer: Any = TOKENIZER, **data: Any) -> Encoder:
    return Encoder(tokenizer, template, StudentDataConfig(**({"path": path, "max_tokens": 128} | data)))


def store(tmp_path: Path, traces: list[Trace], **data: Any) -> TokenStore:
    write_traces(tmp_path / "traces.parquet", traces)
    return open_store(tmp_path / "tokens", encoder(tmp_path / "traces.parquet", **data), lambda done: None)


def test_the_prompt_is_the_students_own_and_the_completion_is_written_as_it_is() -> None:
    trace = make_trace(1)
    ((prompt, completion),) = encoder().encode([trace])
    assert TOKENIZER.decode(prompt) == f"<user>{trace.question}\n<assistant>"
    assert completion[-1] == END
    assert TOKENIZER.decode(completion[:-1]) == trace.completion
    task = Task(task_id="t", prompt=trace.question, answer=None)
    assert tuple(prompt) == Prompter(TOKENIZER, "chat", 999, 1).ids(task)  # as it is sampled from
    ((plain, _),) = encoder(template="plain").encode([trace])
    assert TOKENIZER.decode(plain) == trace.question


def test_chat_messages_go_through_the_template_where_it_can_take_them() -> None:
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 2"}]
    (one,) = encoder().encode([make_trace(question=messages)])
    assert not isinstance(one, str)
    assert TOKENIZER.decode(one.prompt) == "<system>Add.\n<user>1 + 2\n<assistant>"
    assert encoder(template="plain").encode([make_trace(question=messages)]) == [
        "the template can't take the chat messages system, user"
    ]
    picky = make_tokenizer("{{ raise_exception('no system role') }}")
    (reason,) = encoder(tokenizer=picky).encode([make_trace(question=messages)])
    assert reason == "the chat template refuses the question: no system role"


def test_a_template_that_opens_the_think_block_is_not_answered_by_a_second_tag() -> None:
    opening = make_tokenizer(CHAT + "<think>\n")
    trace = make_trace(1)
    ((prompt, completion),) = encoder(tokenizer=opening).encode([trace])
    assert opening.decode([*prompt, *completion[:-1]]) == f"<user>{trace.question}\n<assistant>{trace.completion}"
    assert without_opened_tag("a <think>", "<think>\nb") == "\nb"
    assert without_opened_tag("a <think>\n", "<think>b") == "b"
    assert without_opened_tag("a <think>\n", "b</think>") == "b</think>"
    assert without_opened_tag("what is <think>? ", "<think>\nb") == "<think>\nb"


def test_a_student_without_a_chat_template_needs_another() -> None:
    with pytest.raises(UserError, match="no chat template"):
        encoder(tokenizer=make_tokenizer(None))


def test_what_is_dropped_is_counted_by_its_reason(tmp_path: Path) -> None:
    good = make_traces(3)
    bad = [
        make_trace(3, completion="  "),
        make_trace(4, fault="the think block never closes"),
        make_trace(5, finish_reason="length"),
        make_trace(6, completion="<think>\nso<|end|>\n</think>\n\n7"),
        make_trace(7, completion="<think>\n" + "9 and 8 are 17. " * 100 + "\n</think>\n\n17"),
    ]
    kept = store(tmp_path, [good[0], *bad, *good[1:]])
    assert kept.counts["dropped"] == {
        "empty completion": 1,
        "fault of form: the think block never closes": 1,
        "cut off by the teacher's length limit": 1,
        "the completion contains the end token": 1,
        "longer than data.max_tokens": 1,
    }
    assert (kept.counts["num_traces"], kept.counts["num_used"]) == (8, 3)
    encoded = encoder().encode(good)
    for index, one in enumerate(encoded):
        ids, prompt = kept.row(index)
        assert ids.tolist() == [*one[0], *one[1]]
        assert prompt == len(one[0])
    assert kept.counts["num_tokens"] == sum(kept.lengths)


def test_faulty_and_cut_off_traces_can_be_kept_without_an_end_token_where_they_have_none() -> None:
    open_block, cut_off = make_trace(1, fault="the think block never closes"), make_trace(2, finish_reason="length")
    faulty, cut = encoder(keep_faulty=True).encode([open_block, cut_off])
    assert faulty[1][-1] == END
    assert TOKENIZER.decode(cut[1]) == cut_off.completion


def test_a_trace_of_100k_tokens_is_dropped_or_cut_off_at_the_limit() -> None:
    long = make_trace(1, completion="<think>\n" + "7 and 8 are 15. " * 25_000 + "\n</think>\n\n15")
    assert encoder().encode([long]) == ["longer than data.max_tokens"]
    ((prompt, completion),) = encoder(overlong="truncate").encode([long])
    assert len(prompt) + len(completion) == 128
    assert END not in completion
    assert long.completion.startswith(TOKENIZER.decode(completion))
    assert encoder(overlong="truncate", max_tokens=3).encode([long]) == ["longer than data.max_tokens"]


@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
            st.sampled_from([None, "no answer"]),
            st.sampled_from(["stop", "length", None]),
        ),
        min_size=1,
        max_size=90,
    )
)
def test_every_trace_is_used_or_dropped(tmp_path_factory: Any, rows: list[tuple[str, str | None, str | None]]) -> None:
    traces = [make_trace(0)]
    traces += [
        make_trace(i, completion=text, fault=fault, finish_reason=end) for i, (text, fault, end) in enumerate(rows)
    ]
    kept = store(tmp_path_factory.mktemp("law"), traces, max_tokens=60)
    counts = kept.counts
    assert counts["num_traces"] == len(traces) == counts["num_used"] + sum(counts["dropped"].values())
    assert len(kept) == counts["num_used"]
    assert all(length <= 60 for length in kept.lengths)


def test_the_store_is_made_once_and_says_what_it_was_made_of(tmp_path: Path) -> None:
    first = store(tmp_path, make_traces(5))
    (tmp_path / "traces.parquet").unlink()
    again = open_store(
        tmp_path / "tokens", encoder(tmp_path / "traces.parquet"), lambda done: pytest.fail("read again")
    )
    assert [again.row(i)[0].tolist() for i in range(5)] == [first.row(i)[0].tolist() for i in range(5)]
    assert len(json.loads((tmp_path / "tokens" / "counts.json").read_text())["sha256"]) == 64


def test_no_trace_left_is_an_error_that_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no trace is left.*2 x empty completion"):
        store(tmp_path, [replace(trace, completion="") for trace in make_traces(2)])
    assert not (tmp_path / "tokens").exists()


@settings(deadline=None, derandomize=True, max_examples=40)
@given(num_rows=st.integers(1, 23), num_traces=st.integers(1, 9), num_epochs=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_row_is_learned_once_an_epoch(num_rows: int, num_traces: int, num_epochs: int, seed: int) -> None:
    num_traces = min(num_traces, num_rows)
    rows: Any = range(num_rows)
    batches = TraceBatches(rows, seed=seed, num_traces=num_traces, num_epochs=num_epochs)
    steps = [batches.rows(step) for step in range(batches.num_steps)]
    assert all(len(set(step)) == len(step) == num_traces for step in steps[:-1])
    assert steps[-1]
    assert Counter(row for step in steps for row in step) == dict.fromkeys(range(num_rows), num_epochs)
    capped = TraceBatches(rows, seed=seed, num_traces=num_traces, num_epochs=num_epochs, max_steps=2)
    assert capped.num_steps == min(2, batches.num_steps)


def test_batches_hold_the_rows_and_too_few_rows_are_an_error(tmp_path: Path) -> None:
    kept = store(tmp_path, make_traces(5))
    batches = TraceBatches(kept, seed=3, num_traces=2, num_epochs=1)
    batch = batches.batch(1)
    expected = [kept.row(index) for index in batches.rows(1)]
    assert batch.input_ids.tolist() == [token for ids, _ in expected for token in ids.tolist()]
    assert batch.num_targets == sum(len(ids) - prompt for ids, prompt in expected)
    everything = TraceBatches(kept, seed=3, num_traces=2, num_epochs=1, loss_on_prompt=True).batch(1)
    assert everything.num_targets == len(everything.input_ids) - 2
    with pytest.raises(UserError, match="num_traces=6 exceeds the 5 traces"):
        TraceBatches(kept, seed=0, num_traces=6, num_epochs=1)
