"""Decontamination: 13 words in a row of an evaluation set are found wherever they stand, and every hit is listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.decontaminate import Decontaminated, DecontaminatedConfig, Evaluations
from distill.ngrams import words
from distill.select import SelectConfig, select
from rollout.errors import UserError
from tests.distill.trace_builders import prose, trace

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
QUESTION = f"Let $ABC$ be a triangle. {prose(0, 20)}?"


def write(path: Path, *questions: str, column: str = "question") -> Path:
    path.write_text("".join(json.dumps({column: question}) + "\n" for question in questions), encoding="utf-8")
    return path


def made(tmp_path: Path, *questions: str, **options: Any) -> Decontaminated:
    sets = {"exam": {"path": write(tmp_path / "exam.jsonl", *questions)}}
    return Decontaminated(DecontaminatedConfig(sets=sets, **options))


def test_thirteen_words_in_a_row_are_a_hit_and_twelve_are_not(tmp_path: Path) -> None:
    exam = made(tmp_path, prose(0, 40))
    twelve, thirteen = f"start {prose(5, 12)} end", f"start {prose(5, 13)} end"
    assert exam.fault(trace("a", question=twelve, reasoning="so")) is None
    drop = exam.fault(trace("b", question=thirteen, reasoning="so"))
    assert drop is not None
    assert drop.reason == "question in exam"
    assert exam.listed == [
        {
            "source": "source",
            "question_id": "b",
            "sample_index": None,
            "part": "question",
            "text": thirteen,
            "phrase": prose(5, 13),
            "evaluation_set": "exam",
            "evaluation_row": 0,
            "evaluation_text": prose(0, 40),
        }
    ]


def test_case_markup_and_line_breaks_hide_nothing(tmp_path: Path) -> None:
    exam = made(tmp_path, QUESTION)
    other = QUESTION.upper().replace(" ", "\n  ").replace("$ABC$", r"\(ABC\)")
    assert exam.fault(trace(question=f"{other} Please reason.")) is not None


def test_a_question_is_found_in_the_reasoning_with_the_words_around_it(tmp_path: Path) -> None:
    exam = made(tmp_path, prose(100, 5), prose(0, 20))
    text = f"{prose(3000, 300)} I recall: {prose(0, 20)} {prose(6000, 300)}"
    drop = exam.fault(trace("a", question="What?", reasoning=text, sampling={"sample_index": 3}))
    assert drop is not None
    assert drop.reason == "completion in exam"
    (hit,) = exam.listed
    assert (hit["evaluation_row"], hit["sample_index"], hit["part"]) == (1, 3, "completion")
    assert hit["text"].startswith("...")
    assert f"I recall: {prose(0, 13)}" in hit["text"]
    assert len(hit["text"]) < 900
    only_questions = made(tmp_path, prose(0, 20), parts=("question",))
    assert only_questions.fault(trace("a", question="What?", reasoning=text)) is None


def test_a_hit_in_a_question_drops_all_its_traces_and_is_listed_once(tmp_path: Path) -> None:
    exam = made(tmp_path, QUESTION, f"{QUESTION} And again.", "What else?")
    drops = [exam.fault(trace("a", question=QUESTION, reasoning=prose(n, 9))) for n in range(3)]
    assert all(drop is not None for drop in drops)
    assert [hit["evaluation_row"] for hit in exam.listed] == [0, 1]


def test_a_question_shorter_than_an_n_gram_is_found_whole_and_with_its_signs(tmp_path: Path) -> None:
    exam = made(tmp_path, "Compute $1 + 2$.", "...")
    found = [exam.fault(trace(question=text, reasoning="so")) for text in ("compute 1+2", "Compute $1 - 2$.", "", "?")]
    assert [drop is not None for drop in found] == [True, False, False, False]
    assert exam.fault(trace(question="Why?", reasoning="Compute 1+2")) is None


def test_a_phrase_of_many_questions_is_no_hit(tmp_path: Path) -> None:
    form = prose(0, 15)
    exam = made(tmp_path, *[f"{prose(1000 * n, 14)}. {form}" for n in range(1, 6)], max_questions_with_ngram=4)
    assert exam.fault(trace(question=form, reasoning="so")) is None
    assert exam.fault(trace(question=prose(2000, 14), reasoning="so")) is not None
    exam = made(tmp_path, *[f"{prose(1000 * n, 14)}. {form}" for n in range(1, 6)], max_questions_with_ngram=5)
    assert exam.fault(trace(question=form, reasoning="so")) is not None


def test_a_phrase_said_twice_in_one_question_is_one_question(tmp_path: Path) -> None:
    exam = made(tmp_path, f"{prose(0, 14)} and {prose(0, 14)}", max_questions_with_ngram=1)
    assert exam.fault(trace(question=prose(0, 14))) is not None


@given(
    exam=st.lists(st.lists(st.sampled_from("abcd"), max_size=12).map(" ".join), min_size=1, max_size=4),
    text=st.lists(st.sampled_from("abcd"), max_size=25).map(" ".join),
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_hits_are_those_of_a_plain_search(exam: list[str], text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.mktemp("sets") / "exam.jsonl", *exam)
    config = DecontaminatedConfig(sets={"exam": {"path": path}}, ngram=3, max_questions_with_ngram=99)
    hits = Evaluations(config).hits(text, is_question=False)

    def ngrams(words_: str) -> set[tuple[str, ...]]:
        tokens = words(words_)
        return {tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)}

    assert sorted(hit.passage.row for hit in hits) == [i for i, q in enumerate(exam) if ngrams(q) & ngrams(text)]
    assert all(tuple(hit.phrase.split()) in ngrams(text) & ngrams(hit.passage.text) for hit in hits)


def test_the_hits_are_a_file_beside_the_traces(tmp_path: Path) -> None:
    sets = {
        "exam": {"path": write(tmp_path / "exam.jsonl", QUESTION, column="problem"), "columns": ("problem",)},
        "parquet": {"path": tmp_path / "other.parquet"},
    }
    pq.write_table(pa.table({"question": [prose(7000, 30)]}), tmp_path / "other.parquet")
    traces = [
        trace("a", question=QUESTION),
        trace("b", reasoning=prose(7000, 20)),
        trace("c", reasoning=prose(400, 30)),
    ]
    result = select(traces, SelectConfig(order=("decontaminated",), decontaminated={"sets": sets}), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "decontamination.jsonl").read_text().splitlines()]
    assert [(line["question_id"], line["evaluation_set"], line["part"]) for line in lines] == [
        ("a", "exam", "question"),
        ("b", "parquet", "completion"),
    ]
    assert (result.num_kept, result.num_hits) == (1, 2)
    assert result.funnel.filters[0].dropped == {"question in exam": 1, "completion in parquet": 1}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"problem": "x"}', r"line 1 .*column 'question' is missing \(there are problem\)"),
        ('{"question": 3}', "column 'question' is a int"),
        ("", "the evaluation set 'exam' is empty"),
        ("{", "not valid JSON"),
    ],
)
def test_a_set_that_can_not_be_read_is_named(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "exam.jsonl").write_text(line)
    with pytest.raises(UserError, match=says):
        Evaluations(DecontaminatedConfig(sets={"exam": {"path": tmp_path / "exam.jsonl"}}))


@pytest.mark.skipif(not (SHARED / "math500" / "test.jsonl").exists(), reason="needs ../shared/data: MATH-500, AIME")
def test_published_sets_find_their_own_questions_and_none_of_each_others() -> None:
    sets = {
        "math500": {"path": SHARED / "math500" / "test.jsonl", "columns": ("problem",)},
        "aime25": {"path": SHARED / "aime" / "AIME25.jsonl", "columns": ("problem",)},
    }
    exam = Decontaminated(DecontaminatedConfig(sets=sets))
    for name, path in ((name, values["path"]) for name, values in sets.items()):
        for row, line in enumerate(Path(str(path)).read_text(encoding="utf-8").splitlines()):
            drop = exam.fault(trace(f"{name}/{row}", question=json.loads(line)["problem"], reasoning="so"))
            assert drop is not None, line
            assert drop.reason == f"question in {name}"
