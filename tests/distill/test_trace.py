"""A trace comes back from disk as it was, is split where its marks stand, and no part of a file is ever half there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.trace import (
    TRACE_SCHEMA,
    Form,
    Trace,
    TraceError,
    TraceWriter,
    check_completion_template,
    count_traces,
    from_row,
    part_files,
    read_traces,
    render_completion,
    split_reasoning,
    to_row,
    valid_text,
    write_traces,
)
from rollout.errors import UserError
from verifiers.verdict import Verdict

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
VERDICTS = st.builds(
    Verdict,
    score=st.floats(0, 1),
    status=st.sampled_from(["correct", "wrong", "unparsable", "timeout", "error"]),
    reason=TEXT,
    extracted=st.none() | TEXT,
    parts=st.dictionaries(TEXT, st.floats(0, 1), max_size=2),
    elapsed_s=st.floats(0, 10),
)
TRACES = st.builds(
    Trace,
    question_id=TEXT,
    question=TEXT | st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), min_size=1, max_size=3),
    reasoning=TEXT,
    answer_text=TEXT,
    completion=TEXT,
    fault=st.none() | TEXT,
    gold=JSON,
    verifier=st.none() | TEXT,
    teacher=TEXT,
    source=TEXT,
    sampling=st.dictionaries(TEXT, JSON, max_size=2),
    finish_reason=st.none() | TEXT,
    num_tokens=st.none() | st.integers(0, 2**40),
    verdict=st.none() | VERDICTS,
    filters=st.dictionaries(TEXT, TEXT, max_size=2),
    metadata=st.dictionaries(TEXT, JSON, max_size=2),
)


def make_trace(number: int = 0, **changes: object) -> Trace:
    trace = Trace(
        question_id=f"q/{number}",
        question="1 + 1?",
        reasoning="r",
        answer_text="2",
        completion="c",
        teacher="t",
        source="s",
    )
    return replace(trace, **changes)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(trace=TRACES)
def test_a_row_holds_all_of_a_trace(trace: Trace) -> None:
    assert from_row(to_row(trace)) == trace


@settings(deadline=None, derandomize=True, max_examples=20)
@given(traces=st.lists(TRACES, max_size=6))
def test_a_file_holds_all_traces_in_order(traces: list[Trace], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("traces") / "traces.parquet"
    assert write_traces(path, traces) == len(traces)
    assert list(read_traces(path)) == traces
    assert pq.read_schema(path).equals(TRACE_SCHEMA)


def test_a_row_of_a_hundred_thousand_tokens_comes_back(tmp_path: Path) -> None:
    long = "word " * 100_000
    write_traces(tmp_path / "t.parquet", [make_trace(reasoning=long, completion=f"<think>{long}")])
    (back,) = read_traces(tmp_path / "t.parquet")
    assert back.reasoning == long


def test_what_no_file_can_hold_is_named() -> None:
    with pytest.raises(TraceError, match="'q/0' of s"):
        to_row(make_trace(completion="\ud800"))
    with pytest.raises(TraceError, match="'q/0' of s"):
        to_row(make_trace(metadata={"x": {1}}))


def test_valid_text_mends_what_can_be_mended() -> None:
    assert valid_text("a\ud83d\ude00b") == "a\U0001f600b"
    assert valid_text("a\ud83db") == "a\ufffdb"
    assert valid_text("caf\u00e9") == "caf\u00e9"


# --- splitting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("<think>\nfirst\n</think>\n\nThe answer.", ("first", "The answer.", None)),
        ("first\n</think>\nThe answer.", ("first", "The answer.", None)),
        ("<think>\nand so on", ("and so on", "", "the think block never closes")),
        ("Well. <think>\nand so on", ("Well. <think>\nand so on", "", "the think block never closes")),
        ("42", ("", "42", "there is no think block")),
        ("<think></think> 42", ("", "42", "the reasoning is empty")),
        ("<think>a</think>", ("a", "", "there is no answer after the think block")),
        ("<think>a</think>b</think>c", ("a", "b</think>c", "</think> occurs 2 times")),
        ("Well. <think>a</think>b", ("Well. <think>a", "b", "<think> stands inside the text")),
        ("", ("", "", "there is no think block")),
    ],
)
def test_splitting(text: str, split: tuple) -> None:
    assert tuple(split_reasoning(text)) == split


MARKLESS = st.text(st.characters(exclude_characters="<>", exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(deadline=None, derandomize=True)
@given(reasoning=MARKLESS, answer=MARKLESS)
def test_what_is_rendered_splits_again(reasoning: str, answer: str) -> None:
    worked = Form().of_parts(reasoning, answer)
    assert worked.fault is None
    assert Form().of_text(worked.completion) == worked
    assert (worked.reasoning, worked.answer_text) == (reasoning.strip(), answer.strip())


def test_marks_of_a_teacher_become_those_of_the_student() -> None:
    form = Form(think_open="<|t|>", think_close="<|/t|>", answer_open="<|s|>", answer_close="<|/s|>")
    worked = form.of_text("<|t|>why<|/t|>\n<|s|>\n42\n<|/s|>")
    assert worked == ("why", "42", "<think>\nwhy\n</think>\n\n42", None)
    text = "<|t|>why<|/t|>\n42"
    assert form.of_text(text) == ("why", "42", text, "the answer is not between <|s|> and <|/s|>")


def test_a_block_that_the_prompt_opened() -> None:
    assert Form().of_text("why</think>42", inside=True).completion == "<think>\nwhy\n</think>\n\n42"
    cut_off = Form().of_text("why and", inside=True)
    assert cut_off == ("why and", "", "<think>\nwhy and", "the think block never closes")
    assert Form().of_text("<think>why</think>42", inside=True).reasoning == "why"


def test_parts_that_are_no_answer() -> None:
    assert Form().of_parts("why", "").fault == "there is no answer after the think block"
    assert Form().of_parts("", "42").fault == "the reasoning is empty"
    assert Form().of_parts("a </think> b", "42").fault == "</think> occurs 2 times"


def test_templates_take_text_as_it_is() -> None:
    assert render_completion("<think>{reasoning}</think> {answer}", "{answer}", "{}") == "<think>{answer}</think> {}"
    with pytest.raises(ValueError, match="once each"):
        check_completion_template("{reasoning}")
    with pytest.raises(ValueError, match="before"):
        check_completion_template("{answer}{reasoning}")


# --- parts -------------------------------------------------------------------------------------------------------------


def test_parts_are_whole_and_a_writer_goes_on_after_them(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "raw", rows_per_part=2) as writer:
        for number in range(5):
            writer.write(make_trace(number))
        assert writer.num_kept == 4
    assert [count_traces(part) for part in part_files(tmp_path / "raw")] == [2, 2, 1]
    (tmp_path / "raw" / ".part-000003.parquet.tmp").write_bytes(b"half")
    with TraceWriter(tmp_path / "raw", rows_per_part=2) as writer:
        assert writer.num_kept == 5
        writer.write(make_trace(5))
    assert [trace.question_id for trace in read_traces(tmp_path / "raw")] == [f"q/{n}" for n in range(6)]
    assert writer.merge(tmp_path / "all.parquet") == 6
    assert [trace.question_id for trace in read_traces(tmp_path / "all.parquet")] == [f"q/{n}" for n in range(6)]
    assert not list((tmp_path / "raw").glob(".*"))


def test_a_block_that_fails_leaves_whole_parts_only(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TraceWriter(tmp_path, rows_per_part=2) as writer:
        for number in range(3):
            writer.write(make_trace(number))
        raise RuntimeError
    assert count_traces(tmp_path) == 2


def test_a_file_that_is_no_traces_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match=r"x\.parquet"):
        list(read_traces(tmp_path / "x.parquet"))
