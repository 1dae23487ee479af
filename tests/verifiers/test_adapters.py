"""Reward functions with the signatures of TRL, verl and reasoning-gym, taken as they are."""

import sys
import types

import pytest

from verifiers import PlainTask, VerifierLookupError, resolve

FUNCTIONS = """
import asyncio, re

# TRL: columns arrive as keyword arguments, one value per completion.
def trl_plain(completions, **kwargs):
    return [1.0 if "<b>" in text else 0.0 for text in completions]

def trl_columns(prompts, completions, solution, difficulty, **kwargs):
    return [float(p == "q" and c == s) * d for p, c, s, d in zip(prompts, completions, solution, difficulty)]

def trl_messages(completions: list[list[dict[str, str]]], solution: list[str], **kwargs) -> list[float | None]:
    contents = [completion[0]["content"] for completion in completions]
    return [None if gold == "?" else float(content == gold) for content, gold in zip(contents, solution)]

def trl_closed(completions, answer):
    return [float(c == a) for c, a in zip(completions, answer)]

async def trl_async(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return [0.25] * len(completions)

def trl_ids(completions, completion_ids, **kwargs): return [0.0]
def trl_two(completions, **kwargs): return [1.0, 1.0]
def trl_bare(completions, **kwargs): return 1.0

# verl
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "gsm8k" and extra_info["index"] == 3
    found = re.findall("#### (.*)", solution_str)
    return 1.0 if found and found[-1] == ground_truth else 0.0

def score_dict(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    right = solution_str == ground_truth
    return {"score": 1.0 if right else -1.0, "acc": right, "pred": solution_str, "note": "n"}

def score_half(data_source, solution_str, ground_truth, extra_info): return {"score": 0.5, "partial": 3}
def score_nothing(data_source, solution_str, ground_truth, extra_info): return {"acc": True}

def score_low(data_source, solution_str, ground_truth, extra_info): return {"score": 0.1, "acc": True}

# reasoning-gym
def score_answer(answer, entry):
    if answer == entry["answer"]: return 1.0
    return 0.5 if isinstance(answer, str) and entry["answer"] in answer and entry["metadata"]["n"] == 1 else 0.0
"""


@pytest.fixture(autouse=True)
def functions(tmp_path, monkeypatch):
    (tmp_path / "others_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)


def adapted(adapter, function, **options):
    return resolve(adapter, {"function": f"others_rewards:{function}", **options})


def seen(verdict):
    return verdict.score, verdict.status


def test_trl_with_text_columns_and_scale():
    plain = adapted("trl", "trl_plain")
    assert [seen(plain(text, PlainTask(None))) for text in ("<b>", "b")] == [(1.0, "correct"), (0.0, "wrong")]
    columns = adapted("trl", "trl_columns", answer_column="solution", correct_from=3)
    task = PlainTask("x", "q", {"difficulty": 3})
    assert [seen(columns(text, task)) for text in ("x", "y")] == [(3.0, "correct"), (0.0, "wrong")]
    assert seen(adapted("trl", "trl_closed")("x", task)) == (1.0, "correct")
    assert seen(adapted("trl", "trl_async")("x", task)) == (0.25, "wrong")


def test_trl_with_messages_and_none():
    judge = adapted("trl", "trl_messages", answer_column="solution", messages=True)
    assert seen(judge("x", PlainTask("x"))) == (1.0, "correct")
    skipped = judge("x", PlainTask("?"))
    assert seen(skipped) == (0.0, "error")
    assert skipped.reason == "others_rewards:trl_messages returned None: it does not apply to this sample"


def test_trl_results_of_the_wrong_shape_are_errors():
    for function in ("trl_two", "trl_bare"):
        verdict = adapted("trl", function)("x", PlainTask("x"))
        assert (verdict.status, "not a list of one reward" in verdict.reason) == ("error", True)
    with pytest.raises(VerifierLookupError, match="needs completion_ids, which exists only inside TRL's trainer"):
        adapted("trl", "trl_ids")


def test_verl_numbers_and_dicts():
    task = PlainTask("18", "q", {"data_source": "gsm8k", "extra_info": {"index": 3}})
    number = adapted("verl", "compute_score")
    assert [seen(number(text, task)) for text in ("#### 18", "18")] == [(1.0, "correct"), (0.0, "wrong")]
    assert seen(
        adapted("verl", "compute_score", data_source="gsm8k")("#### 18", PlainTask("18", "", {"index": 3}))
    ) == (
        1.0,
        "correct",
    )
    table = adapted("verl", "score_dict")
    wrong = table("17", task)
    assert (seen(wrong), wrong.parts, wrong.extracted) == ((-1.0, "wrong"), {"acc": 0.0}, "17")
    assert seen(table("18", task)) == (1.0, "correct")
    assert seen(adapted("verl", "score_low")("18", task)) == (0.1, "correct")
    half = adapted("verl", "score_half", correct_from=0.5)("18", task)
    assert (seen(half), half.parts) == ((0.5, "correct"), {"partial": 3.0})
    missing = adapted("verl", "score_nothing")("18", task)
    assert (missing.status, missing.reason) == (
        "error",
        "others_rewards:score_nothing returned a dict without 'score': acc",
    )


def test_reasoning_gym_by_function_and_by_data_set(monkeypatch):
    task = PlainTask("7", "q", {"n": 1, "source_dataset": "sums"})
    by_function = adapted("reasoning_gym", "score_answer")
    texts = ("<answer> 7 </answer>", "<answer>17</answer>", "<answer>5</answer>", "so it is")
    expected = [(1.0, "correct"), (0.5, "wrong"), (0.0, "wrong"), (0.0, "unparsable")]
    assert [seen(by_function(text, task)) for text in texts] == expected
    assert seen(adapted("reasoning_gym", "score_answer", partial_credit=False)(texts[1], task)) == (0.0, "wrong")

    def get_score_answer_fn(name):
        if name != "sums":
            raise ValueError(f"Dataset '{name}' not registered")
        from others_rewards import score_answer

        return score_answer

    library = types.ModuleType("reasoning_gym")
    library.get_score_answer_fn = get_score_answer_fn
    monkeypatch.setitem(sys.modules, "reasoning_gym", library)
    assert [seen(resolve("reasoning_gym")(text, task)) for text in texts] == expected
    assert seen(resolve("reasoning_gym", {"dataset": "sums"})(texts[0], PlainTask("7", "q", {"n": 1}))) == (
        1.0,
        "correct",
    )
    with pytest.raises(VerifierLookupError, match="Dataset 'sum' not registered"):
        resolve("reasoning_gym", {"dataset": "sum"})
    lost = resolve("reasoning_gym")(texts[0], PlainTask("7", "q", {"source_dataset": "sum"}))
    assert (lost.status, lost.reason) == ("error", "reasoning_gym: Dataset 'sum' not registered")
    assert "set the option dataset" in resolve("reasoning_gym")(texts[0], PlainTask("7")).reason


@pytest.mark.parametrize(
    ("adapter", "options", "message"),
    [
        ("trl", {}, "'trl' needs the option 'function'"),
        ("verl", {"function": "others_rewards:nothing"}, "has no 'nothing'"),
        ("verl", {"function": 5}, 'function is 5; it must be "package.module:function"'),
        ("trl", {"function": "others_rewards:trl_plain", "correct_from": "1"}, "correct_from is '1'"),
        ("reasoning_gym", {"dataset": "a", "function": "b:c"}, "one of dataset and function"),
    ],
)
def test_bad_options_are_refused(adapter, options, message):
    with pytest.raises(VerifierLookupError, match=message):
        resolve(adapter, options)
