"""Published traces in their own forms, and files that are broken in the ways files are."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.imports import BROKEN_ANSWER, BROKEN_ROW, import_traces
from distill.trace import Form, Trace
from distill.traces_config import ColumnsConfig, ImportSource
from distill.unreadable import Unreadable
from rollout.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {"question": "prompt", "completion": "completion", "gold": "answer"}


def shipped(name: str, path: Path) -> ImportSource:
    """The one source of a shipped config, on the file of a test."""
    import tomllib

    values = tomllib.loads((ROOT / "configs" / "traces" / f"{name}.toml").read_text())
    (source,) = values["sources"].values()
    return ImportSource.model_validate(source | {"path": path})


def source_of(path: Path, columns: dict[str, Any] | None = None, **fields: Any) -> ImportSource:
    return ImportSource(kind="import", path=path, columns=ColumnsConfig(**(columns or PLAIN)), **fields)


def form_of(source: ImportSource) -> Form:
    return Form(**source.tags.model_dump())


def run(source: ImportSource, folder: Path) -> tuple[list[Trace], Unreadable]:
    with Unreadable(folder / "errors.jsonl", "s") as losses:
        traces = list(import_traces("s", source, form_of(source), losses))
    return traces, losses


def errors(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "errors.jsonl").read_text().splitlines()]


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- the forms of published data -----------------------------------------------------------------------------------------


def test_openr1_math(tmp_path: Path) -> None:
    rows = [
        {
            "problem": "2 + 2?",
            "solution": "four",
            "answer": "4",
            "problem_type": "Algebra",
            "question_type": "math-word-problem",
            "source": "olympiads",
            "uuid": "u-1",
            "is_reasoning_complete": [True, False],
            "generations": ["<think>\ntwo and two\n</think>\n\n\\boxed{4}", "<think>\nhm"],
            "correctness_math_verify": [True, False],
            "correctness_llama": None,
            "finish_reasons": ["stop", "length"],
            "correctness_count": 1,
            "messages": [{"role": "user", "content": "2 + 2?"}],
        }
    ]
    parquet(tmp_path / "train-00000.parquet", rows)
    first, second = run(shipped("import_openr1_math", tmp_path), tmp_path)[0]
    assert (first.question_id, first.question, first.gold, first.verifier) == ("s/u-1", "2 + 2?", "4", "math")
    assert (first.reasoning, first.answer_text, first.fault) == ("two and two", "\\boxed{4}", None)
    assert (first.finish_reason, second.finish_reason) == ("stop", "length")
    assert first.metadata["correctness_math_verify"] is True
    assert first.metadata["source"] == "olympiads"
    assert (first.sampling["temperature"], first.sample_index, second.sample_index) == (0.6, 0, 1)
    assert second.fault == "the think block never closes"
    assert second.completion == "<think>\nhm"


def test_openthoughts_114k(tmp_path: Path) -> None:
    row = {
        "problem": "p",
        "deepseek_reasoning": "r",
        "deepseek_solution": "a",
        "ground_truth_solution": None,
        "domain": "puzzle",
        "source": "x",
        "test_cases": None,
        "starter_code": None,
    }
    parquet(tmp_path / "t.parquet", [row, row | {"domain": "math", "ground_truth_solution": "\\boxed{1}"}])
    puzzle, mathematics = run(shipped("import_openthoughts_114k", tmp_path), tmp_path)[0]
    assert (puzzle.gold, mathematics.gold) == (None, "\\boxed{1}")
    assert puzzle.completion == "<think>\nr\n</think>\n\na"
    assert (puzzle.question_id, mathematics.question_id) == ("s/0", "s/1")


def test_openthoughts3(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "<think>r</think>a"}]
    parquet(tmp_path / "t.parquet", [{"difficulty": 8, "source": "x", "domain": "math", "conversations": turns}])
    (trace,) = run(shipped("import_openthoughts3", tmp_path), tmp_path)[0]
    assert (trace.question, trace.reasoning, trace.answer_text) == ("q", "r", "a")
    assert trace.metadata == {"domain": "math", "source": "x", "difficulty": 8}


def test_s1k(tmp_path: Path) -> None:
    row = {
        "solution": "7",
        "question": "q",
        "cot_type": "math",
        "source_type": "aime",
        "metadata": "{}",
        "cot": None,
        "thinking_trajectories": ["r"],
        "attempt": "a",
    }
    parquet(tmp_path / "t.parquet", [row])
    (trace,) = run(shipped("import_s1k", tmp_path), tmp_path)[0]
    assert (trace.reasoning, trace.answer_text, trace.gold) == ("r", "a", "7")


def test_s1k_1_1(tmp_path: Path) -> None:
    row = {"question": "q", "solution": "7", "cot_type": "math", "source_type": "aime", "deepseek_grade": "Yes"}
    row |= {"deepseek_thinking_trajectory": "r", "deepseek_attempt": "a", "gemini_attempt": "other"}
    parquet(tmp_path / "t.parquet", [row])
    (trace,) = run(shipped("import_s1k_1_1", tmp_path), tmp_path)[0]
    assert (trace.reasoning, trace.answer_text, trace.metadata["deepseek_grade"]) == ("r", "a", "Yes")


def test_bespoke_stratos(tmp_path: Path) -> None:
    answer = "<|begin_of_thought|>\n\nr\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\na\n\n<|end_of_solution|>"
    turns = [{"from": "user", "value": "q"}, {"from": "assistant", "value": answer}]
    parquet(tmp_path / "t.parquet", [{"system": "Use the marks.", "conversations": turns}])
    (trace,) = run(shipped("import_bespoke_stratos", tmp_path), tmp_path)[0]
    assert (trace.question, trace.completion, trace.fault) == ("q", "<think>\nr\n</think>\n\na", None)


def test_plain_messages(tmp_path: Path) -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    path = jsonl(tmp_path / "m.jsonl", [{"messages": [system, user, answer]}, {"messages": [answer, user]}])
    source = shipped("import_messages", path)
    (trace,), losses = run(source, tmp_path)
    assert trace.question == [system, user]
    assert (trace.reasoning, trace.answer_text) == ("r", "a")
    assert losses.counts == {BROKEN_ROW: 1}
    assert errors(tmp_path)[0]["reason"] == "the last message is of 'user', not of the assistant"


def test_rows_with_one_id_are_answers_to_one_question(tmp_path: Path) -> None:
    rows = [{"id": name, "prompt": "q", "completion": "<think>r</think>a", "answer": "1"} for name in "aba"]
    traces, _ = run(source_of(jsonl(tmp_path / "x.jsonl", rows), PLAIN | {"id": "id"}), tmp_path)
    assert [(trace.question_id, trace.sample_index) for trace in traces] == [("s/a", 0), ("s/b", 0), ("s/a", 1)]


# --- broken files --------------------------------------------------------------------------------------------------------


def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {"prompt": f"q{number}", "completion": "<think>r</think>a", "answer": "1"} | changes


def test_broken_lines_are_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    lines = [
        b"\xef\xbb\xbf" + json.dumps(row(0)).encode(),
        b'{"prompt": "cut off',
        b"",
        b"[1, 2]",
        b'{"prompt": "caf\xe9", "completion": "x", "answer": "1"}',
        json.dumps({"prompt": "q", "answer": "1"}).encode(),
        json.dumps(row(7, prompt="pair \ud83d\ude00 alone \ud83d")).encode(),
        json.dumps(row(8, completion=["<think>r</think>a", None])).encode(),
        b"[" * 100_000,
        json.dumps(row(10)).encode(),
    ]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    traces, losses = run(source_of(path), tmp_path)
    assert [trace.question for trace in traces] == ["q0", "pair \U0001f600 alone \ufffd", "q8", "q10"]
    assert losses.counts == {BROKEN_ROW: 5, BROKEN_ANSWER: 1}
    found = [(error["place"].removeprefix(f"{path}, "), error["kind"]) for error in errors(tmp_path)]
    assert [place for place, _ in found] == ["line 2", "line 4", "line 5", "line 6", "line 8, answer 1", "line 9"]
    assert "not valid JSON" in errors(tmp_path)[0]["reason"]
    assert "not valid utf-8 at byte 15" in errors(tmp_path)[2]["reason"]
    assert "no column 'completion'; it has prompt, answer" in errors(tmp_path)[3]["reason"]


def test_stop_at_the_first_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row()) + "\n{\n")
    with pytest.raises(UserError, match=r"x\.jsonl, line 2: not valid JSON"):
        run(source_of(path, on_broken="stop"), tmp_path)


def test_a_second_encoding_for_lines_that_are_not_in_the_first(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [json.dumps(row(prompt="caf\u00e9"), ensure_ascii=False).encode(code) for code in ("utf-8", "cp1252")]
    path.write_bytes(b"\n".join(lines))
    traces, losses = run(source_of(path, fallback_encoding="cp1252"), tmp_path)
    assert [trace.question for trace in traces] == ["caf\u00e9", "caf\u00e9"]
    assert not losses.counts


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "x.jsonl"
    rows = [json.dumps(row(number, prompt="\u010a \u4e0a"), ensure_ascii=False) for number in range(3)]
    path.write_bytes("\n".join(rows).encode(encoding))
    traces, losses = run(source_of(path), tmp_path)
    assert [trace.question for trace in traces] == ["\u010a \u4e0a"] * 3
    assert not losses.counts


def test_a_column_map_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"problem": "q"}] * 3)
    with pytest.raises(UserError, match=r"no row could be read; .*line 1: no column 'prompt'; it has problem"):
        run(source_of(path), tmp_path)
    parquet(tmp_path / "x.parquet", [{"prompts": "q", "completion": "c", "answer": "1"}])
    with pytest.raises(UserError, match=r"no column 'prompt' \(columns\.question\).*did you mean 'prompts'"):
        run(source_of(tmp_path / "x.parquet"), tmp_path)


def test_damaged_parquet_loses_what_is_damaged(tmp_path: Path) -> None:
    rows = [row(number, completion=f"<think>{number}</think>{'x' * 500}") for number in range(40)]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10, compression="none", use_dictionary=False)
    column = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start : start + 60] = b"\xff" * 60
    path.write_bytes(data)
    traces, losses = run(source_of(path), tmp_path)
    assert [trace.question_id for trace in traces] == [f"s/{n}" for n in (*range(10), *range(20, 40))]
    assert losses.counts == {BROKEN_ROW: 10}
    assert errors(tmp_path)[0]["place"].endswith("rows 10 to 19")


def test_too_long_lines_are_passed_over(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [row(0), row(1, prompt="y" * 5000), row(2)])
    traces, _ = run(source_of(path, max_line_bytes=2048), tmp_path)
    assert [trace.question for trace in traces] == ["q0", "q2"]
    assert errors(tmp_path)[0]["place"].endswith("line 2")


def test_a_long_file_streams(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    line = json.dumps(row(completion=f"<think>{'r' * 100_000}</think>a")).encode() + b"\n"
    with path.open("wb") as file:
        for _ in range(1500):
            file.write(line)
    source = source_of(path)
    with Unreadable(tmp_path / "errors.jsonl", "s") as losses:
        traces = import_traces("s", source, Form(), losses)
        for _ in range(5):
            next(traces)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        count = sum(1 for _ in traces)
        grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert count == 1495
    assert grown_mib < 40  # of 150 MB


def test_max_rows_counts_broken_ones_too(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([json.dumps(row(0)), "{", json.dumps(row(2)), json.dumps(row(3))]))
    traces, losses = run(source_of(path, max_rows=3), tmp_path)
    assert [trace.question_id for trace in traces] == ["s/0", "s/2"]
    assert losses.counts == {BROKEN_ROW: 1}
