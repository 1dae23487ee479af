"""Where a final answer is found, and that hostile text costs no more than its length."""

import time

import pytest

from verifiers.extract import (
    MAX_BOX_SEARCH_CHARS,
    Stated,
    final_answer,
    last_answer_block,
    last_boxed,
    stated_answer,
)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>2+3</think><answer>5</answer>", "5"),
        ("<answer>4</answer><answer>5</answer>", "5"),
        ("<answer>5</answer> and <answer>6", "5"),
        ("<answer>6 <answer>5</answer>", "5"),
        ("<answer>5</answer> tail </answer>", "5"),
        ("<think><answer>6</answer></think> none", None),
        ("<think>\\boxed{6}</think>\\boxed{5}", "5"),
        ("<think>a</think> no <think>b</think>\\boxed{5}", "5"),
        ("<answer>so \\boxed{5}</answer>", "5"),
        ("<answer>5</answer> \\boxed{6}", "5"),
        ("\\boxed{3}, wait: \\boxed{5}.", "5"),
        ("\\boxed{5} and \\boxed{6", "5"),
        ("\\boxed {5}", "5"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{a \\} b}", "a \\} b"),
        ("} { \\boxed{5} }", "5"),
        ("\\boxed{1 \\boxed{2}}", "2"),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_final_answer(completion, expected):
    assert final_answer(completion) == expected


@pytest.mark.parametrize(
    "piece", ["<answer>", "</answer>", "\\boxed{", "{", "}", "\\", "\\boxed ", "<think>", "</think>"]
)
def test_repeated_markers_take_linear_time(piece):
    text = piece * 300_000
    start = time.perf_counter()
    assert final_answer(text) in (None, "")
    assert time.perf_counter() - start < 2


def test_box_search_stops_at_its_bound():
    assert last_boxed("\\boxed{5}" + " " * (MAX_BOX_SEARCH_CHARS - 9)) == "5"
    assert last_boxed("\\boxed{5}" + " " * MAX_BOX_SEARCH_CHARS) is None


def test_answer_block_needs_both_tags():
    assert last_answer_block("</answer>5<answer>") is None
    assert last_answer_block("5</answer>") is None
    assert last_answer_block("<answer></answer>") == ""


@pytest.mark.parametrize(
    ("completion", "text", "source"),
    [
        # The order of the rules.
        ("<think>\\boxed{3}</think>\\boxed{5}", "5", "box"),
        ("<answer>5</answer> \\boxed{6}", "5", "answer_tag"),
        ("<answer>so \\(\\boxed{5}\\)</answer>", "5", "answer_tag"),
        ("<answer>The answer is $5$.</answer>", "5", "answer_tag"),
        ("<answer>5", "5", "answer_tag"),
        ("<answer>4</answer> <answer>5", "4", "answer_tag"),
        ("The answer is 4. So \\boxed{5}", "5", "box"),
        ("\\boxed{3}, wait. The final answer is 5.", "5", "statement"),
        ("\\boxed{3}, wait. The final answer is \\boxed{5}.", "5", "box"),
        ("\\boxed{5}. The answer is in simplest form.", "5", "box"),
        ("\\boxed{5}. The answer is 6 for other inputs.", "5", "box"),
        # Boxes.
        ("\\boxed{2} and \\boxed{3}", "2, 3", "box"),
        ("$x=\\boxed{2}$, $y=\\boxed{3}$", "x = 2, y = 3", "box"),
        ("\\boxed{2}. Hence \\boxed{3}", "3", "box"),
        ("\\boxed{5} or \\boxed{5}", "5", "box"),
        ("\\boxed{\\boxed{5}}", "5", "box"),
        ("\\boxed{x = \\boxed{5}}", "x = {5}", "box"),
        ("\\fbox{5}", "5", "box"),
        ("\\\\boxed{5}", "5", "box"),
        ("\\boxed 5", "5", "box"),
        ("\\boxed{$5$}", "5", "box"),
        ("\\boxed{5}, as in \\boxed{}", "5", "box"),
        ("\\boxed{5} and \\boxed{6", "5", "box"),
        # Stated answers.
        ("**Final Answer:** 5", "5", "statement"),
        ("### Final Answer\n\n\\[\n\\frac{1}{2}\n\\]", "\\frac{1}{2}", "statement"),
        ("The final answer is $(0, 1)$. I hope it is correct.", "(0, 1)", "statement"),
        ("Final Answer: The volume of $P$ is 120. I hope it is correct.", "120", "statement"),
        ("The answer is 5, not 6.", "5", "statement"),
        ("The answer is 5 because 2+3=5.", "5", "statement"),
        ("The answer is 1.5.", "1.5", "statement"),
        ("The answer is $x=1$ or $x=2$.", "$x=1$ or $x=2$", "statement"),
        ("Therefore $x \\ge 5$ is the solution.", "x \\ge 5", "statement"),
        ("2 + 3 = 5\nA: 5", "5", "statement"),
        ("2 + 3 = 5\n#### 1,005", "1,005", "statement"),
        ("### Answer\n5", "5", "statement"),
        ("The answer is about 3.14.", "3.14", "statement"),
        ("The answer is $x=3$, which is clear.", "x=3", "statement"),
        ("最终答案是：$5$。", "5", "statement"),
        ("所以答案为5", "5", "statement"),
        ("故选：B", "B", "statement"),
        # Nothing but a value, and concluding sentences.
        ("\\frac12", "\\frac12", "bare"),
        ("$x^2$", "x^2", "bare"),
        ("\\(x^2\\).", "x^2", "bare"),
        ("$$\nx^2\n$$", "x^2", "bare"),
        ("12 cm", "12 cm", "bare"),
        ("So the side has length $3$ cm.", "$3$ cm", "bare"),
        ("It never reaches $3$ cm.", "It never reaches $3$ cm", "bare"),
        ("Therefore, $x = 6$.", "x = 6", "bare"),
        ("综上，x=5。", "x=5", "bare"),
        ("We add. Hence, $x = 6$.", "x = 6", "conclusion"),
        ("\\text{(B)}", "\\text{(B)}", "bare"),
        ("The matrix is $A$", "$A$", "bare"),
        ("5<|im_end|>\n<|im_start|>user\n6", "5", "bare"),
        ("<|im_start|>assistant\n5<|im_end|>", "5", "bare"),
        ("First add them. So the sum of both is 12 cm.", "12 cm", "conclusion"),
        ("先相加。因此总和是12", "12", "conclusion"),
        # Nothing stated.
        ("", None, "none"),
        ("   \n", None, "none"),
        ("<think>\\boxed{5}", None, "none"),
        ("<think>\\boxed{5}</think>", None, "none"),
        ("Add 2 and 3. Then add 4. That was 9 before.", None, "none"),
        ("x = 5. Check: 5 + 1 = 6.", None, "none"),
        ("The answer is unclear to me. I tried 5 and 6.", None, "none"),
        ("Answer $\n9\n$", None, "none"),
        ("Final answer: \\boxed{}", None, "none"),
        ("<answer></answer>", None, "answer_tag"),
        ("\\boxed{\\frac{1}{2}", None, "box"),
    ],
)
def test_stated_answer(completion, text, source):
    stated = stated_answer(completion)
    expected = text.strip("$") if text == "$A$" else text
    assert (stated.text, stated.source) == (expected, source), stated
    assert stated.reason


def test_the_last_number_only_where_it_is_asked_for():
    text = "Add 2 and 3. Then it grows by 1,234.5 in all. Let me see."
    assert stated_answer(text).text is None
    assert stated_answer(text, last_number=True) == Stated("1,234.5", "last_number", "the last number of the text")
    assert stated_answer("Use x2 and y_3. No.", last_number=True).source == "none"
    assert stated_answer("\\boxed{5} and 6", last_number=True).text == "5"


@pytest.mark.parametrize(
    ("boxes", "text"), [("last", "3"), ("all", "2, 3"), ("single", None)], ids=["last", "all", "single"]
)
def test_box_policies(boxes, text):
    assert stated_answer("\\boxed{2}. Hence \\boxed{3}", boxes=boxes).text == text
    assert stated_answer("\\boxed{2}. Hence \\boxed{2}", boxes=boxes).text == "2"


def test_an_unknown_box_policy_is_refused():
    with pytest.raises(ValueError, match="boxes"):
        stated_answer("5", boxes="first")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "piece",
    ["\\", "\\(", "$", "\\boxed", "\\boxed 5", "answer is ", "final answer\n", "\n", " ", "A: ", "答案是", "So is 5 ",
     "**", ". ", "1,", "1/", "<|im_end|>", "\\boxed{5}, ", "the answer to the ", "\"", "x = "],
)  # fmt: skip
def test_hostile_text_takes_linear_time(piece):
    text = piece * (200_000 // len(piece))
    start = time.perf_counter()
    for completion in (text, f"\\boxed{{{text}}}", f"The final answer is {text}"):
        stated_answer(completion, last_number=True)
    assert time.perf_counter() - start < 3
