"""The audit of a data set's golds: which field is read, what is counted and shown, and unusable files."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from scripts.verify_data import DataAuditError, audit_lines, verify_data
from verifiers import VerifierLookupError

GOLDS = ["A", "(B)", "", "Z", None, "C", "12"]
COUNTS = {"ok": 3, "unparsable": 2, "ambiguous": 0, "embedded_number": 0, "missing": 2}


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps({"rows": rows}))
    else:
        path.write_text("\n\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.parquet"])
def test_counts_and_examples(tmp_path, name):
    path = write(tmp_path / name, [{"problem": "p", "ground_truth": gold} for gold in GOLDS])
    audit = verify_data(path, "choice", examples=1)
    assert (audit.num_rows, audit.answer_field, audit.counts, audit.num_not_audited) == (7, "ground_truth", COUNTS, 0)
    assert [(status, [example.row for example in shown]) for status, shown in audit.examples.items() if shown] == [
        ("unparsable", [4]), ("missing", [3]),
    ]  # fmt: skip
    assert audit.examples["unparsable"][0].answer == "Z"
    lines = audit_lines(audit)
    assert lines[0] == "7 rows, gold answers from `ground_truth`"
    assert lines[1].split() == ["ok", "3", "42.9%"]
    assert not any("ambiguous" in line for line in lines)


def test_every_row_is_written_in_order(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"answer": gold} for gold in GOLDS])
    verify_data(path, "choice", out=tmp_path / "audit.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["status"] for row in rows] == ["ok", "ok", "missing", "unparsable", "missing", "ok", "unparsable"]
    assert [row["parsed"] for row in rows][:2] == ["A", "B"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["audit.jsonl", "data.jsonl"]


def test_options_metadata_and_fields(tmp_path):
    nested = write(tmp_path / "a.jsonl", [{"reward_model": {"ground_truth": ["G"]}}])
    audit = verify_data(nested, "choice", {"num_options": 7})
    assert (audit.answer_field, audit.counts["ok"]) == ("reward_model.ground_truth", 1)
    with_options = write(tmp_path / "b.jsonl", [{"answer": "Rome", "options": ["Paris", "Rome"]}])
    assert verify_data(with_options, "choice").counts["ok"] == 1
    named = write(tmp_path / "c.jsonl", [{"answer": "Z", "key": "B"}])
    assert verify_data(named, "choice", answer_field="key").counts["ok"] == 1


def test_a_verifier_without_an_audit_says_so(tmp_path):
    audit = verify_data(write(tmp_path / "a.jsonl", [{"answer": "5"}]), "format")
    assert (audit.num_not_audited, sum(audit.counts.values())) == (1, 0)
    assert "nothing to say" in audit_lines(audit)[-1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no rows"),
        (b'{"answer": 1}\n{"answer": ', "line 2"),
        (b'{"answer": 1}\n[1]', "line 2: a list"),
        (b"\xff\xfe", "line 1"),
        (b'{"x": 1}', "'x'"),
    ],
)
def test_unusable_input_is_named(tmp_path, content, says):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataAuditError, match=says):
        verify_data(path, "choice", out=tmp_path / "out.jsonl")
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.jsonl"]


def test_unusable_arguments(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"answer": "A"}])
    with pytest.raises(DataAuditError, match="does not exist"):
        verify_data(tmp_path / "none.jsonl", "choice")
    with pytest.raises(DataAuditError, match="Parquet"):
        verify_data(path.rename(tmp_path / "a.parquet"), "choice")
    with pytest.raises(VerifierLookupError, match="mathh"):
        verify_data(write(path, [{"answer": "A"}]), "mathh")
    with pytest.raises(ValueError, match="examples"):
        verify_data(path, "choice", examples=-1)
