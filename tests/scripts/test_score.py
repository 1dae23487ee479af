"""`score_file`: rows come back in order and untouched; whatever is wrong is said before anything is scored."""

import json
import os
from pathlib import Path

import pytest

from rollout.errors import UserError
from scripts import score as module
from scripts.score import ScoreFileError, parse_options, score_file
from verifiers import VerifierLookupError

GOOD = b'{"completion": "<answer>5</answer>", "answer": 5}'


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def run(paths, content, verifier="numeric", timeout_s=5.0):
    paths[0].write_bytes(content)
    return score_file(paths[0], verifier, paths[1], num_workers=1, timeout_s=timeout_s)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_keep_order_bytes_and_columns(paths, monkeypatch):
    monkeypatch.setattr(module, "MAX_BLOCK_ROWS", 3)
    lines = [
        f'{{"completion": "\\\\boxed{{{i}}}", "answer": {i % 4}, "loss":1.10, "n":12345678901234567890,"é":"\\u00e9" }}'
        for i in range(10)
    ]
    summary = run(paths, "\n".join(["\ufeff" + lines[0], "", *lines[1:]]).encode())
    out = paths[1].read_bytes().decode().splitlines()
    for i, (line, scored) in enumerate(zip(lines, out, strict=True)):
        assert scored.startswith(line.removesuffix(" }") + ', "verdict": {')
        verdict = json.loads(scored)["verdict"]
        assert list(verdict) == ["score", "status", "reason", "extracted", "parts", "elapsed_s"]
        assert (verdict["score"], verdict["extracted"]) == (float(i < 4), str(i))
    assert summary.counts == {"correct": 4, "wrong": 6, "unparsable": 0, "timeout": 0, "error": 0}
    assert (summary.num_rows, summary.mean_score, summary.worker_restarts) == (10, 0.4, 0)
    assert summary.rows_per_s == pytest.approx(10 / summary.seconds)
    assert sorted(os.listdir(paths[0].parent)) == ["in.jsonl", "out.jsonl"]


def test_every_status_is_counted_and_the_run_goes_on(paths, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score_plugin.py").write_text(
        "import os, time\n"
        "def f(completion, task):\n"
        "    if completion == 'die': os._exit(1)\n"
        "    if completion == 'hang': time.sleep(60)\n"
        "    return task.metadata.get('score', 0) if task.prompt == 'p' else 1 / 0\n"
    )
    rows = [
        {"completion": "die", "answer": 1},
        {"completion": "hang", "answer": 1},
        {"completion": "", "answer": 1},
        {"completion": "", "answer": 1, "prompt": "p", "metadata": {"score": 0.5}},
        {"completion": "", "answer": 1, "prompt": "p", "metadata": {"score": 1}},
        {"completion": "", "answer": 1, "prompt": "p", "metadata": None},
    ]
    summary = run(paths, "\n".join(map(json.dumps, rows)).encode(), "score_plugin:f", timeout_s=0.4)
    scored = read(paths[1])
    assert [row["verdict"]["status"] for row in scored] == ["error", "timeout", "error", "wrong", "correct", "wrong"]
    assert [{k: v for k, v in row.items() if k != "verdict"} for row in scored] == rows
    assert summary.counts == {"correct": 1, "wrong": 2, "unparsable": 0, "timeout": 1, "error": 2}
    assert summary.mean_score == pytest.approx(0.25)
    assert summary.worker_restarts == 2


def test_options_and_the_rows_own_verifiers(paths):
    rows = [{"completion": "<answer>5</answer>", "answer": 5, "verifier": name} for name in ("numeric", "format", "x")]
    rows.append({"completion": "<answer>5</answer>", "answer": 5, "verifier": None})
    paths[0].write_text("\n".join(map(json.dumps, rows)))
    options = parse_options(['verifiers=["numeric", "format"]', "default=numeric"])
    score_file(paths[0], "by_task", paths[1], 1, 5.0, options)
    assert [row["verdict"]["status"] for row in read(paths[1])] == ["correct", "wrong", "error", "correct"]
    with pytest.raises(VerifierLookupError, match="no option 'defalt', did you mean 'default'"):
        score_file(paths[0], "by_task", paths[1], 1, 5.0, {"defalt": "numeric"})


def test_option_values_are_json_or_else_text():
    settings = ["a=1", "b=0.5", "c=true", 'd={"x": [1]}', "e=en", "f=a=b", "g=", 'h="1"']
    expected = {"a": 1, "b": 0.5, "c": True, "d": {"x": [1]}, "e": "en", "f": "a=b", "g": "", "h": "1"}
    assert parse_options(settings) == expected
    for bad, message in (
        (["x"], "write it as key=value"),
        (["=1"], "write it as key=value"),
        (["a=1", "a=2"], "twice"),
    ):
        with pytest.raises(UserError, match=message):
            parse_options(bad)


def test_a_scored_file_can_be_scored_again(paths):
    run(paths, GOOD)
    run(paths, paths[1].read_bytes(), "format")
    (row,) = read(paths[1])
    assert list(row) == ["completion", "answer", "verdict"]
    assert (row["verdict"]["status"], row["verdict"]["parts"]) == ("wrong", {"format": 0.0})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", "line 3: not JSON"),
        (b"\xff\xfe", "line 3: not JSON in UTF-8"),
        (b"[" * 100_000, "line 3: "),
        (b"[1]", "line 3: a list, not a JSON object"),
        (b'{"answer": 5}', "line 3: the row has no `completion`; its columns are 'answer'"),
        (b'{"completion": "x"}', "line 3: the row has no `answer`"),
        (b'{"completion": "x", "answer": null}', "line 3: the row has no `answer`"),
        (b'{"completion": ["x"], "answer": 1}', "line 3: `completion` is a list, not text"),
        (b'{"completion": "x", "answer": 1, "metadata": [1]}', "line 3: `metadata` is a list, not an object"),
        (b'{"completion": "x", "answer": 1, "verifier": 5}', "line 3: `verifier` is a int, not a name"),
    ],
)
def test_a_bad_row_is_named_before_anything_is_scored(paths, monkeypatch, line, message):
    monkeypatch.setattr(module.ScorePool, "score", lambda *_: pytest.fail("scored before the file was checked"))
    with pytest.raises(ScoreFileError, match=f"in.jsonl, {message}"):
        run(paths, GOOD + b"\n\n" + line + b"\n" + GOOD)
    assert os.listdir(paths[0].parent) == ["in.jsonl"]


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error(paths, content):
    with pytest.raises(ScoreFileError, match="has no rows"):
        run(paths, content)


def test_an_unknown_verifier_names_the_nearest(paths):
    with pytest.raises(VerifierLookupError, match="did you mean 'numeric'"):
        run(paths, GOOD, "numerics")
    assert not paths[1].exists()


def test_unusable_places_are_refused(paths, tmp_path):
    source, _ = paths
    source.write_bytes(GOOD)
    (tmp_path / "link.jsonl").symlink_to(source)
    (tmp_path / "hard.jsonl").hardlink_to(source)
    for out, message in (
        (source, "is the input"),
        (tmp_path / "x" / ".." / "in.jsonl", "is the input"),
        (tmp_path / "link.jsonl", "is the input"),
        (tmp_path / "hard.jsonl", "is the input"),
        (tmp_path, "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
        (tmp_path / "no" / "out.jsonl", "does not exist"),
    ):
        with pytest.raises(ScoreFileError, match=message):
            score_file(source, "numeric", out, 1, 1.0)
    for missing, message in ((tmp_path / "none.jsonl", "does not exist"), (tmp_path, "is not a file")):
        with pytest.raises(ScoreFileError, match=message):
            score_file(missing, "numeric", tmp_path / "out.jsonl", 1, 1.0)
    assert source.read_bytes() == GOOD


def test_a_failure_on_the_way_keeps_the_old_output(paths, monkeypatch):
    paths[1].write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module, "_scored_line", fail)
    with pytest.raises(OSError, match="disk full"):
        run(paths, GOOD)
    assert paths[1].read_text() == "old"
    assert sorted(os.listdir(paths[0].parent)) == ["in.jsonl", "out.jsonl"]


def test_the_output_may_be_a_link(paths, tmp_path):
    (tmp_path / "real.jsonl").write_text("old")
    paths[1].symlink_to(tmp_path / "real.jsonl")
    run(paths, GOOD)
    assert paths[1].is_symlink()
    assert read(tmp_path / "real.jsonl")[0]["verdict"]["status"] == "correct"


def test_a_gold_with_more_digits_than_python_reads_by_default(tmp_path: Path) -> None:
    answer = '{"mode": "call", "fn_name": "f", "tests": [{"args": [], "expected": 1' + "0" * 5000 + "}]}"
    row = '{"completion": "def f():\\n    return 10 ** 5000", "answer": ' + answer + "}\n"
    (tmp_path / "rows.jsonl").write_text(row)
    summary = score_file(tmp_path / "rows.jsonl", "code", tmp_path / "out.jsonl", 1, 10.0)
    assert summary.counts["correct"] == 1
