"""Selection: every trace goes exactly one way, each filter drops what it says, and the files agree with the counts."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from distill.filters.base import Drop, reason_of
from distill.funnel import FilterCounts, Funnel, FunnelError, SourceCounts
from distill.select import FILTERS, SelectConfig, SelectionResult, check_selection, make_filters, select
from distill.trace import Trace, read_traces
from rollout.errors import UserError
from rollout.toml_config import describe, to_toml
from tests.distill.trace_builders import Scorer, prose, trace
from verifiers.verdict import Verdict


def run(
    tmp_path: Path, traces: Sequence[Trace], *order: str, pool: Scorer | None = None, **tables: Any
) -> tuple[SelectionResult, list[Trace], list[Trace]]:
    """The result, the kept and the dropped traces of one selection."""
    config = SelectConfig(order=order, **tables)
    result = select(iter(traces), config, tmp_path, pool=pool or Scorer())
    return result, list(read_traces(tmp_path / "traces.parquet")), list(read_traces(tmp_path / "dropped.parquet"))


def fault(filter_name: str, one: Trace, **options: Any) -> str | None:
    """The reason of one filter for one trace."""
    (made,) = make_filters(SelectConfig(order=(filter_name,), **{filter_name: options}), Scorer())
    (judged,) = made.judge([one])
    return judged.drop and judged.drop.reason


# --- every trace goes exactly one way --------------------------------------------------------------------------------

TEXTS = (
    "<think>so</think> \\boxed{4}",
    "<think>so</think> \\boxed{5}",
    "<think>so it never ends",
    "no thinking, 4",
    "<think>one</think> two </think> 4",
    "<think>" + "again and " * 40 + "</think> \\boxed{4}",
    "<think>早上好，我们来算一下这个题目</think> \\boxed{4}",
    "<think>" + prose(0, 60) + "</think> \\boxed{4}",
    "<think>" + prose(1, 60) + "</think> \\boxed{4}",
    "<think>" + prose(900, 60) + "</think> \\boxed{4}",
    "",
    "</think>",
)
VERDICTS = st.sampled_from(["correct", "wrong", "unparsable", "timeout", "error", None])


@st.composite
def any_trace(draw: st.DrawFn) -> Trace:
    status: Any = draw(VERDICTS)
    number = draw(st.integers(0, 5))
    return trace(
        f"set/{number}",
        text=draw(st.sampled_from(TEXTS)),
        question=f"{prose(0, 30)} {number // 2}",
        source=draw(st.sampled_from(["one", "two"])),
        gold=draw(st.sampled_from(["4", None])),
        finish_reason=draw(st.sampled_from(["stop", "length", "tool_calls", None])),
        num_tokens=draw(st.integers(0, 12)),
        verdict=None if status is None else Verdict(score=0.0, status=status, reason="recorded"),
        sampling={"sample_index": draw(st.integers(0, 3))},
    )


TABLES: dict[str, Any] = {
    "length": {"min_tokens": 2, "max_tokens": 10},
    "at_most_k": {"k": 2},
    "difficulty": {"min_pass_rate": 0.2, "max_pass_rate": 0.9},
}


@given(traces=st.lists(any_trace(), max_size=25), order=st.permutations([n for n in FILTERS if n != "decontaminated"]))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_what_comes_in_is_kept_or_dropped_once_for_a_counted_reason(traces: list[Trace], order: list[str]) -> None:
    if order.index("difficulty") < order.index("verified_correct"):
        order.remove("difficulty")
    with tempfile.TemporaryDirectory() as folder:
        result, kept, dropped = run(Path(folder), traces, *order, **TABLES)
        written = json.loads((Path(folder) / "funnel.json").read_text())

    def identity(item: Trace) -> str:
        return repr(replace(item, filters={}, verdict=None))

    assert Counter(map(identity, kept + dropped)) == Counter(map(identity, traces))
    assert (result.num_in, result.num_kept) == (len(traces), len(kept))
    assert all(set(item.filters) == set(order) and {*item.filters.values()} == {"kept"} for item in kept if order)
    by_reason: Counter[tuple[str, str, str]] = Counter()
    for item in dropped:
        *before, (last, word) = item.filters.items()
        assert [name for name, _ in before] == order[: len(before)]
        assert all(value == "kept" for _, value in before)
        reason = reason_of(word)
        assert reason is not None
        by_reason[last, item.source, reason] += 1
    counted = {
        (counts["name"], source, reason): number
        for counts in written["filters"]
        for source, numbers in counts["sources"].items()
        for reason, number in numbers["dropped"].items()
    }
    assert counted == by_reason
    for before, after in zip(written["filters"], written["filters"][1:], strict=False):
        assert before["num_kept"] == after["num_in"]
    for counts in written["filters"]:
        assert counts["num_in"] == counts["num_kept"] + sum(counts["dropped"].values())
    assert Funnel.from_dict(written).to_dict() == written == result.funnel.to_dict()


def test_a_funnel_that_loses_a_trace_is_an_error() -> None:
    first, second = FilterCounts("first"), FilterCounts("second")
    first.count("a", None, 3)
    first.count("a", "bad")
    second.count("a", None, 2)
    with pytest.raises(FunnelError, match="3 traces should have reached second, and 2 did"):
        Funnel([first, second]).check(4, 2)
    with pytest.raises(FunnelError, match="kept 3 traces, and 4 were written"):
        Funnel([first]).check(4, 4)
    Funnel([first]).check(4, 3)


def test_what_was_lost_while_gathering_is_the_first_stage(tmp_path: Path) -> None:
    sources = {
        "source": {"traces": 2, "lost": {"broken row": 3}},
        "silent": {"traces": 0, "lost": {"request given up": 1}},
    }
    traces = [trace(finish_reason="length"), trace("set/1")]
    result = select(traces, SelectConfig(order=("finished",)), tmp_path, sources=sources)
    stage = result.funnel.filters[0]
    assert (stage.name, stage.num_in, stage.num_kept) == ("gathered", 6, 2)
    assert stage.dropped == {"broken row": 3, "request given up": 1}
    assert result.funnel.sources == ["source", "silent"]
    assert result.funnel.of_source("silent")[-1] == ("finished", SourceCounts())
    with pytest.raises(FunnelError, match="5 traces should have reached finished, and 2 did"):
        select(traces, SelectConfig(order=("finished",)), tmp_path, sources={"source": {"traces": 5, "lost": {}}})


def test_traces_are_streamed_in_batches(tmp_path: Path) -> None:
    """A second batch is read only after the first went through: never all of them in memory."""
    events: list[str] = []

    class Watching(Scorer):
        def score(self, completions: Sequence[str], tasks: Any) -> list[Verdict]:
            events.append(f"scored {len(completions)}")
            return super().score(completions, tasks)

    def stream() -> Any:
        for number in range(600):
            events.append("read")
            yield trace(f"set/{number}")

    config = SelectConfig(order=("verified_correct", "at_most_k"))
    result = select(stream(), config, tmp_path, pool=Watching())
    assert result.num_kept == 600
    assert [event for event in events if event != "read"] == ["scored 256", "scored 256", "scored 88"]
    assert events.index("scored 256") == 256
    assert not (tmp_path / "selecting").exists()


def test_long_rows_make_short_batches(tmp_path: Path) -> None:
    """Rows of 100k tokens, one that never closes: through all filters, a few at a time."""
    sizes: list[int] = []

    class Watching(Scorer):
        def score(self, completions: Sequence[str], tasks: Any) -> list[Verdict]:
            sizes.append(len(completions))
            return super().score(completions, tasks)

    long = prose(0, 8000) * 80  # 13 million characters
    traces = [
        trace("set/0", text=f"<think>{long}", num_tokens=4_000_000),
        trace("set/1", text=f"<think>{long}</think> \\boxed{{4}}", num_tokens=4_000_000),
        trace("set/2"),
    ]
    result, kept, dropped = run(tmp_path, traces, "verified_correct", "well_formed", "length", pool=Watching())
    assert sizes == [2, 1]
    assert [item.question_id for item in kept] == ["set/2"]
    assert {item.question_id: list(item.filters.values())[-1].partition(":")[0] for item in dropped} == {
        "set/0": "wrong answer",
        "set/1": "too long",
    }
    assert result.num_tokens == [50]


def test_selecting_again_replaces_what_was_there(tmp_path: Path) -> None:
    traces = [trace(f"set/{number}", finish_reason=["stop", "length"][number % 2]) for number in range(4)]
    run(tmp_path, traces, "finished")
    (tmp_path / "selecting").mkdir()  # of a process that was killed
    (tmp_path / "selecting" / "part-000000.parquet").write_bytes(b"rubbish")
    _, kept, dropped = run(tmp_path, traces[:3], "finished")
    assert [item.question_id for item in kept] == ["set/0", "set/2"]
    assert [item.question_id for item in dropped] == ["set/1"]


def test_nothing_in_is_nothing_out(tmp_path: Path) -> None:
    result, kept, dropped = run(tmp_path, [], *(name for name in FILTERS if name != "decontaminated"))
    assert (result.num_in, result.num_kept, kept, dropped) == (0, 0, [], [])
    assert {counts.name: counts.num_in for counts in result.funnel.filters} == dict.fromkeys(
        (name for name in FILTERS if name != "decontaminated"), 0
    )


def test_a_dropped_trace_says_why(tmp_path: Path) -> None:
    _, _, dropped = run(tmp_path, [trace(finish_reason="odd")], "finished")
    assert dropped[0].filters == {"finished": "ended by something else: odd"}


# --- configs ---------------------------------------------------------------------------------------------------------


def test_the_default_config_has_every_filter_that_needs_no_more_to_be_said() -> None:
    assert set(FILTERS) - set(SelectConfig().order) == {"decontaminated", "difficulty"}
    assert {row.path.partition(".")[0] for row in describe(SelectConfig)} == {"order", *FILTERS}
    assert all(row.description for row in describe(SelectConfig))
    assert "[at_most_k]" in to_toml(SelectConfig())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"order": ("finished", "length", "finished")}, "order names finished twice"),
        ({"order": ("decontaminated",)}, "decontaminated needs evaluation sets"),
        ({"order": ("difficulty", "verified_correct")}, "needs verified_correct before it"),
        ({"length": {"min_tokens": 5, "max_tokens": 4}}, "min_tokens 5 is above max_tokens 4"),
        ({"difficulty": {"min_pass_rate": 0.5, "max_pass_rate": 0.4}}, "is above max_pass_rate"),
        ({"language_consistent": {"language": "eng"}}, "language 'eng' is unknown"),
    ],
)
def test_a_config_that_can_not_work_says_why(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SelectConfig(**values)


def test_what_is_missing_is_said_before_anything_is_gathered(tmp_path: Path) -> None:
    check_selection(SelectConfig())
    with pytest.raises(UserError, match=r"'mth'.*'math'"):
        check_selection(SelectConfig(verified_correct={"verifier": "mth"}))
    with pytest.raises(UserError, match="no such file"):
        check_selection(SelectConfig(order=("difficulty",), difficulty={"rates": tmp_path / "rates.jsonl"}))
    sets = {"aime": {"path": tmp_path / "aime.jsonl"}}
    with pytest.raises(UserError, match=r"aime\.jsonl"):
        check_selection(SelectConfig(order=("decontaminated",), decontaminated={"sets": sets}))


# --- the filters -----------------------------------------------------------------------------------------------------


def test_verified_correct_keeps_the_right_ones_with_their_verdict(tmp_path: Path) -> None:
    pool = Scorer(hangs="timeout", breaks="error", mute="unparsable")
    answers = {
        "right": r"\boxed{4}",
        "wrong answer": r"\boxed{5}",
        "the verifier ran out of time": "hangs",
        "the verifier failed": "breaks",
        "no readable answer": "mute",
    }
    traces = [trace(name, answer_text=text) for name, text in answers.items()]
    _, kept, dropped = run(tmp_path, [*traces, trace("no known answer", gold=None)], "verified_correct", pool=pool)
    assert [(item.question_id, item.verdict.status) for item in kept if item.verdict] == [("right", "correct")]
    assert {item.question_id: reason_of(item.filters["verified_correct"]) for item in dropped} == {
        name: name for name in [*answers, "no known answer"] if name != "right"
    }
    assert {item.question_id: item.verdict.status for item in dropped if item.verdict} == {
        "wrong answer": "wrong",
        "the verifier ran out of time": "timeout",
        "the verifier failed": "error",
        "no readable answer": "unparsable",
    }
    assert len(pool.asked) == 5  # nothing is asked of one without a known answer


def test_a_verdict_that_is_there_is_not_asked_for_again_unless_its_verifier_failed(tmp_path: Path) -> None:
    def judged(status: Any) -> Trace:
        return trace(status, verdict=Verdict(score=0.0, status=status, reason="earlier"), reasoning=f"{status} earlier")

    pool = Scorer()
    _, kept, _ = run(
        tmp_path, [judged(s) for s in ("correct", "wrong", "error", "timeout")], "verified_correct", pool=pool
    )
    assert [item.question_id for item in kept] == ["correct", "error", "timeout"]
    assert [text.split()[1] for text in pool.asked] == ["error", "timeout"]


def test_a_trace_is_judged_by_its_own_verifier_in_real_processes(tmp_path: Path) -> None:
    traces = [
        trace("half", gold="1/2", answer_text=r"\boxed{0.5}"),
        trace("wrong", gold="1/2", answer_text=r"\boxed{0.6}"),
        trace("letter", gold="B", verifier="choice", answer_text=r"The answer is \boxed{B}"),
        trace("stranger", verifier="nobody"),
    ]
    config = SelectConfig(order=("verified_correct",), verified_correct={"num_workers": 1, "timeout_s": 30})
    select(traces, config, tmp_path)
    assert [item.question_id for item in read_traces(tmp_path / "traces.parquet")] == ["half", "letter"]
    reasons = {item.question_id: item.filters["verified_correct"] for item in read_traces(tmp_path / "dropped.parquet")}
    assert reasons["wrong"].startswith("wrong answer: ")
    assert "'nobody'" in reasons["stranger"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<think>so</think> 4", None),
        ("so</think> 4", None),
        ("<think>so", "the think block never closes"),
        ("4", "there is no think block"),
        ("<think>a</think>b</think>c", "</think> occurs more than once"),
        ("<think>a</think>b</think>c</think>d", "</think> occurs more than once"),
        ("<think>a <think>b</think> 4", "<think> stands inside the text"),
        ("<think> </think> 4", "the reasoning is empty"),
        ("<think>so</think> ", "there is no answer after the think block"),
    ],
)
def test_well_formed_is_one_think_block_and_an_answer(text: str, reason: str | None) -> None:
    assert fault("well_formed", trace(text=text)) == reason


@pytest.mark.parametrize(
    ("answer", "form", "reason"),
    [
        (r"so \boxed{4}", "box", None),
        ("so 4", "box", "the answer is outside the template"),
        (r"\boxed{4} or \boxed{5}", "box", "not one answer"),
        (r"\boxed{4}, again \boxed{4}", "box", None),
        ("<answer>4</answer>", "tag", None),
        (r"\boxed{4}", "tag", "the answer is outside the template"),
        ("<answer>4</answer><answer>5</answer>", "tag", "not one answer"),
        ("The answer is 4.", "stated", None),
        (
            "I do not know how this one goes. I give up on it, as one must.",
            "stated",
            "the answer is outside the template",
        ),
        ("I do not know how this one goes. I give up on it, as one must.", "any", None),
    ],
)
def test_well_formed_wants_one_answer_in_the_form_asked_for(answer: str, form: str, reason: str | None) -> None:
    assert fault("well_formed", trace(answer_text=answer), answer=form) == reason


def test_an_answer_inside_the_thinking_does_not_count() -> None:
    inside = trace(reasoning=r"it is \boxed{4}", answer_text="as I said above, that is how it goes")
    assert fault("well_formed", inside, answer="box") == "the answer is outside the template"


@pytest.mark.parametrize(
    ("word", "unknown", "reason"),
    [
        ("stop", "drop", None),
        ("length", "keep", "cut off at the longest length"),
        (None, "keep", None),
        (None, "drop", "how it ended is unknown"),
        ("content_filter", "keep", "ended by something else"),
    ],
)
def test_finished(word: str | None, unknown: str, reason: str | None) -> None:
    assert fault("finished", trace(finish_reason=word), unknown=unknown) == reason


@pytest.mark.parametrize(
    ("reasoning", "options", "reason"),
    [
        (prose(0, 30), {}, None),
        (prose(0, 30) + "我们来算一下这个题目" * 4, {}, "mixed languages"),
        ("我们来算一下这个题目", {"language": "zh"}, None),
        ("12 + 7 = 19", {"language": "en"}, None),
    ],
)
def test_language_consistent(reasoning: str, options: dict[str, Any], reason: str | None) -> None:
    assert fault("language_consistent", trace(reasoning=reasoning), **options) == reason


def test_the_language_is_that_of_the_users_question() -> None:
    asked = [
        {"role": "system", "content": "Think in English, please, whatever."},
        {"role": "user", "content": "算一下"},
    ]
    assert fault("language_consistent", trace(question=asked, reasoning="我们来算一下这个题目")) is None
    assert fault("language_consistent", trace(question="7 * 6", reasoning="so")) == "the question's language is unknown"


def test_the_answers_language_counts_where_all_is_asked_for() -> None:
    mixed = trace(reasoning=prose(0, 10), answer_text="我们来算一下这个题目我们来算一下这个题目")
    assert fault("language_consistent", mixed) is None
    assert fault("language_consistent", mixed, part="all") == "mixed languages"


def test_no_repetition() -> None:
    assert fault("no_repetition", trace(reasoning=prose(0, 300))) is None
    assert fault("no_repetition", trace(reasoning=prose(0, 40) + " wait, no" * 20)) == "ends in a loop"
    assert fault("no_repetition", trace(text=prose(0, 40) + " wait, no" * 20)) == "ends in a loop"
    assert fault("no_repetition", trace(reasoning=" ".join([prose(0, 30), prose(60, 9)] * 3))) == "repeats itself"


def test_length_bounds_are_included() -> None:
    bounds = {"min_tokens": 2, "max_tokens": 3}
    found = [fault("length", trace(num_tokens=number), **bounds) for number in (1, 2, 3, 4)]
    assert found == ["too short", None, None, "too long"]


def test_a_trace_of_unknown_length_stops_the_selection_at_once(tmp_path: Path) -> None:
    pool = Scorer()
    with pytest.raises(UserError, match=r"source has none for 'set/7'.*tokenizer"):
        run(tmp_path, [trace(), trace("set/7", num_tokens=None)], "verified_correct", "length", pool=pool)
    assert pool.asked == []
    run(tmp_path, [trace("set/7", num_tokens=None)], "finished")


# --- difficulty ------------------------------------------------------------------------------------------------------


def samples(question_id: str, num_right: int, num_wrong: int, num_failed: int = 0) -> list[Trace]:
    answers = [r"\boxed{4}"] * num_right + [r"\boxed{5}"] * num_wrong + ["hangs"] * num_failed
    return [trace(question_id, answer_text=a, sampling={"sample_index": i}) for i, a in enumerate(answers)]


def test_difficulty_by_the_teachers_pass_rate_counts_all_its_traces(tmp_path: Path) -> None:
    """The wrong ones count although they are gone, those whose verifier failed do not."""
    traces = [
        *samples("easy", 4, 0, num_failed=1),
        *samples("hard", 1, 9),
        *samples("middle", 1, 1, num_failed=3),
        *samples("never", 0, 2),
    ]
    bounds = {"min_pass_rate": 0.2, "max_pass_rate": 0.5}
    pool = Scorer(hangs="timeout")
    _, kept, dropped = run(tmp_path, traces, "verified_correct", "difficulty", pool=pool, difficulty=bounds)
    assert [item.question_id for item in kept] == ["middle"]
    words = {item.question_id: item.filters["difficulty"] for item in dropped if "difficulty" in item.filters}
    assert words == {"easy": "too easy: pass rate 1.000", "hard": "too hard: pass rate 0.100"}


def test_the_last_verdict_counts_before_the_first_question_is_judged(tmp_path: Path) -> None:
    traces = [*samples("a", 1, 0), *[trace(f"b/{n}") for n in range(400)], *samples("a", 0, 1)]
    _, kept, _ = run(tmp_path, traces, "verified_correct", "difficulty", difficulty={"max_pass_rate": 0.5})
    assert [item.question_id for item in kept] == ["a"]


def test_difficulty_by_recorded_rates(tmp_path: Path) -> None:
    rates = tmp_path / "rates.jsonl"
    rates.write_text('{"question_id": "easy", "pass_rate": 1}\n{"question_id": "middle", "pass_rate": 0.5}\n')
    difficulty = {"rates": rates, "max_pass_rate": 0.9}
    traces = [trace("easy"), trace("middle"), trace("unheard of")]
    result, kept, _ = run(tmp_path / "out", traces, "difficulty", difficulty=difficulty)
    assert [item.question_id for item in kept] == ["middle"]
    assert result.funnel.filters[0].dropped == {"too easy": 1, "pass rate unknown": 1}


def test_difficulty_by_the_samples_of_a_run(tmp_path: Path) -> None:
    statuses = {"easy": ["correct", "correct", "error"], "hard": ["wrong", "unparsable"], "unscored": [None]}
    lines = [{"task_id": name, "status": status} for name, found in statuses.items() for status in found]
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = [fault("difficulty", trace(name), rates=path, min_pass_rate=0.1, max_pass_rate=1.0) for name in statuses]
    assert found == [None, "too hard", "pass rate unknown"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"question_id": "a", "pass_rate": 1.5}', "line 1 .*pass_rate is 1.5"),
        ('{"question_id": "a"}', "pass_rate is None"),
        ('{"id": "a", "pass_rate": 1}', "need the columns question_id and pass_rate"),
    ],
)
def test_rates_that_are_none_are_named_with_their_line(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "rates.jsonl").write_text(line)
    with pytest.raises(UserError, match=says):
        make_filters(SelectConfig(order=("difficulty",), difficulty={"rates": tmp_path / "rates.jsonl"}))


# --- at most k -------------------------------------------------------------------------------------------------------


def families(question_id: str = "set/0") -> list[Trace]:
    """Nine traces in three families of almost the same text."""
    return [
        trace(
            question_id, reasoning=f"{prose(1000 * family, 80)} {prose(100 * member, 2)}", metadata={"family": family}
        )
        for family in range(3)
        for member in range(3)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_at_most_k_takes_the_traces_least_alike(tmp_path: Path, seed: int) -> None:
    _, kept, dropped = run(tmp_path, families(), "at_most_k", at_most_k={"k": 3, "seed": seed})
    assert sorted(item.metadata["family"] for item in kept) == [0, 1, 2]
    assert {item.filters["at_most_k"] for item in dropped} == {"more than k of one question: 3 of 9 kept"}


def test_at_most_k_chooses_by_text_and_not_by_order(tmp_path: Path) -> None:
    traces = families()
    chosen = []
    for number, order in enumerate((traces, traces[::-1], traces[4:] + traces[:4])):
        _, kept, _ = run(tmp_path / str(number), order, "at_most_k", at_most_k={"k": 4})
        chosen.append({item.completion for item in kept})
    assert len(chosen[0]) == 4
    assert chosen[0] == chosen[1] == chosen[2]


def test_another_seed_begins_elsewhere(tmp_path: Path) -> None:
    first = set()
    for seed in range(6):
        _, kept, _ = run(tmp_path / str(seed), families(), "at_most_k", at_most_k={"k": 1, "seed": seed})
        first.add(kept[0].completion)
    assert len(first) > 1


def test_at_most_k_counts_what_reaches_it_of_each_question(tmp_path: Path) -> None:
    traces = [*families("a"), trace("b"), *[replace(item, finish_reason="length") for item in families("c")[:8]]]
    traces.append(families("c")[8])
    _, kept, _ = run(tmp_path, traces, "finished", "at_most_k", at_most_k={"k": 2})
    assert Counter(item.question_id for item in kept) == {"a": 2, "b": 1, "c": 1}


def test_equal_texts_fill_up_k(tmp_path: Path) -> None:
    _, kept, _ = run(tmp_path, [trace() for _ in range(5)], "at_most_k", at_most_k={"k": 3})
    assert len(kept) == 3


def test_a_drop_is_its_reason_and_its_detail() -> None:
    assert str(Drop("too long", "9: tokens")) == "too long: 9: tokens"
    assert reason_of("too long: 9: tokens") == "too long"
    assert reason_of("kept") is None
