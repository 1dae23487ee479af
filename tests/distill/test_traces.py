"""The traces run: gathered, selected, all accounted for, and taken up where a kill left it."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from distill.trace import Trace, read_traces, write_traces
from distill.traces import TracesConfig, check_sources, make_traces
from rollout.errors import UserError
from rollout.interrupt import RunInterrupted
from rollout.run import RunRecord, SilentObserver
from rollout.toml_config import load_config, to_toml
from tests.distill.endpoint_server import completion, running

ROOT = Path(__file__).resolve().parents[2]
SELECT = {
    "order": ["well_formed", "verified_correct", "finished", "at_most_k"],
    "verified_correct": {"verifier": "numeric", "num_workers": 1},
    "at_most_k": {"k": 2},
}


class Stopping(SilentObserver):
    """Sends this process a signal at a step."""

    def __init__(self, at: int, number: int = signal.SIGINT) -> None:
        self.at, self.number = at, number

    def step(self, step: int, num_steps: int, metrics: Mapping[str, Any]) -> None:
        if step == self.at:
            os.kill(os.getpid(), self.number)


def rows(folder: Path) -> Path:
    """Six lines: two good, one wrong, one that never closes, one without a gold, one broken."""
    lines = [
        {"prompt": "1+1?", "completion": "<think>r one</think><answer>2</answer>", "answer": "2"},
        {"prompt": "2+2?", "completion": "<think>r two</think><answer>4</answer>", "answer": "4"},
        {"prompt": "3+3?", "completion": "<think>r three</think><answer>5</answer>", "answer": "6"},
        {"prompt": "4+4?", "completion": "<think>r four and", "answer": "8"},
        {"prompt": "5+5?", "completion": "<think>r five</think><answer>10</answer>", "answer": None},
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    return path


def imported(folder: Path) -> dict[str, Any]:
    columns = {"question": "prompt", "completion": "completion", "gold": "answer"}
    return {"kind": "import", "path": rows(folder), "columns": columns}


def asked(url: str, count: int = 3) -> dict[str, Any]:
    return {
        "kind": "endpoint",
        "base_url": url,
        "model": "m",
        "data": {"source": "generator", "generator": "arithmetic"},
        "num_questions": count,
        "num_samples": 3,
        "num_concurrent": 1,
    }


def config_of(folder: Path, sources: dict[str, Any], **fields: Any) -> TracesConfig:
    values = {"name": "t", "run_dir": str(folder / "{name}-{seed}"), "sources": sources, "select": SELECT}
    return TracesConfig.model_validate(values | fields)


def run(config: TracesConfig, observer: SilentObserver | None = None) -> dict[str, Any]:
    check_sources(config)
    record = RunRecord.open(
        config.run_path, config.model_dump(mode="json"), to_toml(config), resume=False, command="traces"
    )
    with record:
        return make_traces(config, record, observer or SilentObserver())


def test_every_row_goes_one_way(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"rows": imported(tmp_path)})
    summary = run(config)
    assert (summary["num_raw"], summary["num_lost"], summary["num_kept"], summary["num_dropped"]) == (5, 1, 2, 3)
    folder = config.run_path
    kept = list(read_traces(folder / "traces.parquet"))
    assert [trace.question for trace in kept] == ["1+1?", "2+2?"]
    assert kept[0].completion == "<think>\nr one\n</think>\n\n<answer>2</answer>"
    assert kept[0].verdict is not None
    assert kept[0].verdict.status == "correct"
    assert set(kept[0].filters.values()) == {"kept"}
    dropped = {trace.question: [word for word in trace.filters.values() if word != "kept"] for trace in
               read_traces(folder / "dropped.parquet")}  # fmt: skip
    assert set(dropped) == {"3+3?", "4+4?", "5+5?"}
    assert all(len(words) == 1 for words in dropped.values())
    (error,) = [json.loads(line) for line in (folder / "errors.jsonl").read_text().splitlines()]
    assert error["place"].endswith("rows.jsonl, line 6")
    funnel = json.loads((folder / "funnel.json").read_text())
    assert (funnel["num_in"], funnel["num_kept"]) == (6, 2)
    assert funnel["num_in"] - funnel["num_kept"] == sum(sum(f["dropped"].values()) for f in funnel["filters"])
    assert "broken row" in (folder / "README.md").read_text()
    assert {"config.toml", "versions.json", "git.json", "summary.json"} <= {path.name for path in folder.iterdir()}


def test_sources_side_by_side_and_the_student_s_form(tmp_path: Path) -> None:
    with running(lambda body, number: completion("<answer>7</answer>", reasoning_content="why")) as server:
        config = config_of(
            tmp_path,
            {"rows": imported(tmp_path), "far": asked(server.url)},
            completion_template="<think>{reasoning}</think> {answer}",
            select=SELECT | {"order": ["well_formed", "at_most_k"]},
        )
        summary = run(config)
    kept = list(read_traces(config.run_path / "traces.parquet"))
    assert Counter(trace.source for trace in kept) == {"rows": 4, "far": 6}  # at most two of three of a question
    assert {trace.completion for trace in kept if trace.source == "far"} == {"<think>why</think> <answer>7</answer>"}
    assert [(name, counts["traces"]) for name, counts in summary["sources"].items()] == [("rows", 5), ("far", 9)]


def test_a_run_that_is_stopped_goes_on(tmp_path: Path) -> None:
    with running(lambda body, number: completion("<think>a</think><answer>7</answer>")) as server:
        config = config_of(tmp_path, {"rows": imported(tmp_path), "far": asked(server.url)})
        with pytest.raises(RunInterrupted, match="4 of 9 answers of far are kept"):
            run(config, Stopping(at=4))
        summary = run(config)
        assert len(server.bodies) == 9
    assert summary["sources"]["far"]["traces"] == 9
    assert summary["num_raw"] == summary["num_kept"] + summary["num_dropped"] == 14


def test_a_run_that_is_killed_goes_on_and_ends_alike(tmp_path: Path) -> None:
    with running(lambda body, number: completion(f"<think>{body['seed']}</think><answer>7</answer>")) as server:
        sources = {"rows": imported(tmp_path), "far": asked(server.url)}
        run(config_of(tmp_path / "straight", sources))
        killed = config_of(tmp_path / "killed", sources)
        child = os.fork()
        if child == 0:
            run(killed, Stopping(at=5, number=signal.SIGKILL))
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        rows(tmp_path).unlink()  # what is finished is not read again
        rows_path = tmp_path / "rows.jsonl"
        rows_path.write_text("{}\n")
        run(killed)
        assert len(server.bodies) == 18
    for name in ("traces.parquet", "dropped.parquet"):
        straight, again = (
            [_timeless(trace) for trace in read_traces(tmp_path / where / "t-0" / name)]
            for where in ("straight", "killed")
        )
        assert again == straight


def _timeless(trace: Trace) -> tuple[Any, ...]:
    return (trace.question_id, trace.sampling, trace.completion, trace.filters, trace.source)


def test_parts_of_a_source_that_was_not_finished_are_written_again(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"rows": imported(tmp_path)}, rows_per_part=2)
    run(config)
    for name in ("summary.json", "raw/rows/done.json"):
        (config.run_path / name).unlink()
    assert run(config)["num_raw"] == 5


def test_traces_of_a_run_are_selected_anew_without_being_asked_for(tmp_path: Path) -> None:
    first = config_of(tmp_path, {"rows": imported(tmp_path)})
    run(first)
    again = config_of(
        tmp_path,
        {"old": {"kind": "traces", "path": first.run_path / "raw" / "rows"}},
        name="again",
        select=SELECT | {"order": ["well_formed"]},
    )
    assert run(again)["num_kept"] == 4
    (first_kept, *_) = read_traces(again.run_path / "traces.parquet")
    assert (first_kept.source, first_kept.metadata["earlier_source"]) == ("old", "rows")
    assert set(first_kept.filters) == {"well_formed"}


def test_a_selection_that_fails_says_where_what_was_paid_for_is(tmp_path: Path) -> None:
    def without_usage(body: dict[str, Any], number: int) -> dict[str, Any]:
        return completion("<think>a</think>b") | {"usage": None}

    with running(without_usage) as server:
        config = config_of(tmp_path, {"far": asked(server.url)}, select={"order": ["length"]})
        with pytest.raises(UserError, match=r"needs token counts(?s:.*)kept: another run can select from it"):
            run(config)
    assert len(list(read_traces(config.run_path / "raw" / "far"))) == 9


def test_an_empty_source_is_no_error(tmp_path: Path) -> None:
    write_traces(tmp_path / "none.parquet", [])
    config = config_of(tmp_path, {"none": {"kind": "traces", "path": tmp_path / "none.parquet"}})
    summary = run(config)
    assert (summary["num_raw"], summary["num_kept"], summary["num_dropped"]) == (0, 0, 0)


def test_what_is_missing_is_said_before_anything_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("D1_TEST_KEY", raising=False)
    missing = {"kind": "traces", "path": tmp_path / "nothing"}
    with pytest.raises(UserError, match=r"sources\.old\.path"):
        check_sources(config_of(tmp_path, {"old": missing}))
    keyed = asked("http://localhost:1/v1") | {"api_key_variable": "D1_TEST_KEY"}
    with pytest.raises(UserError, match="D1_TEST_KEY"):
        check_sources(config_of(tmp_path, {"far": keyed}))
    with pytest.raises(UserError, match="set tokenizer"):
        check_sources(config_of(tmp_path, {"rows": imported(tmp_path)}, select={"order": ["length"]}))
    with pytest.raises(ValueError, match=r"can't be a source's name"):
        config_of(tmp_path, {"a/b": missing})
    with pytest.raises(ValueError, match="at least one source"):
        config_of(tmp_path, {})


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "traces").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_configs_load_and_come_back_from_toml(path: Path, tmp_path: Path) -> None:
    config = load_config(TracesConfig, path)
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_config(TracesConfig, tmp_path / "again.toml") == config


def test_configs_are_put_together(tmp_path: Path) -> None:
    names = [str(ROOT / "configs" / "traces" / f"import_{name}.toml") for name in ("s1k", "openr1_math")]
    (tmp_path / "both.toml").write_text(f'extends = {json.dumps(names)}\nname = "both"\n')
    config = load_config(TracesConfig, tmp_path / "both.toml", ["sources.s1k.max_rows=5"])
    assert set(config.sources) == {"s1k", "openr1_math"}
    assert config.sources["s1k"].max_rows == 5
