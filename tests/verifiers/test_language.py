"""`language`: the share of words in the target's script, and what does not count as a word."""

import pytest

from verifiers import PlainTask, VerifierLookupError, prepare, resolve
from verifiers.writing import count_words, prose


def share(text, language=None, prompt="", **options):
    verdict = resolve("language", {"language": language, **options})(text, PlainTask(None, prompt))
    return verdict.score, verdict.status


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("We add the two numbers.", "en", 1.0),
        ("We add 两个 numbers", "en", 3 / 5),
        ("我们 add 它", "zh", 3 / 4),
        ("これは漢字です", "ja", 1.0),
        ("これは漢字です", "zh", 2 / 7),
        ("두 수를 더하면", "ko", 1.0),
        ("Сложим два числа", "ru", 1.0),
        ("Сложим two числа", "ru", 2 / 3),
        ("نجمع العددين", "ar", 1.0),
        ("नमस्ते दुनिया", "hi", 1.0),
        ("Wir möchten größere Zahlen", "de", 1.0),
        ("เราบวกกัน", "th", 1.0),
    ],
)
def test_shares(text, language, expected):
    score, status = share(text, language)
    assert score == pytest.approx(expected)
    assert status == ("correct" if expected >= 0.9 else "wrong")


@pytest.mark.parametrize(
    "noise",
    [
        "```python\nfor item in values: print(item)\n```",
        "~~~\nsome code here\n~~~",
        "`some code`",
        "$\\text{speed} = distance$",
        "$$\\sum velocity$$",
        "\\(alpha + beta\\)",
        "\\[gamma\\]",
        "<answer>",
        "https://example.com/some/words",
        "x, y ABC1 x_total \\frac",
    ],
)
def test_code_formulas_tags_and_symbols_are_no_words(noise):
    assert share(f"我们 {noise} 计算", "zh") == (1.0, "correct")


def test_only_the_thinking_counts_unless_told_otherwise():
    text = "<think>We add them.</think><answer>答案是五</answer>"
    assert share(text, "en") == (1.0, "correct")
    assert share(text, "en", part="all") == (3 / 7, "wrong")
    assert share(text, "en", part="all", threshold=0.4) == (3 / 7, "correct")


@pytest.mark.parametrize(
    ("prompt", "thinking", "expected"),
    [
        ("How many apples are left?", "Three of them", 1.0),
        ("How many apples are left?", "还剩三个", 0.0),
        ("还剩几个苹果？设为 apples", "还剩三个", 1.0),
        ("りんごは何個ですか", "三個です", 1.0),
        ("三个苹果", "りんごです", 0.0),
        (
            [{"role": "system", "content": "你好你好"}, {"role": "user", "content": "How many apples?"}],
            "Three left",
            1.0,
        ),
    ],
)
def test_without_a_language_it_is_the_prompts(prompt, thinking, expected):
    assert share(thinking, prompt=prompt)[0] == expected


def test_no_words_and_no_target_are_told_apart():
    assert share("<think>$1+1$</think>", "en") == (0.0, "unparsable")
    verifier = resolve("language")
    assert verifier("words", PlainTask(None, "$1+1$")).status == "error"
    audit = prepare(verifier, PlainTask(None, "$1+1$"))
    assert audit is not None
    assert audit.status == "missing"
    assert prepare(verifier, PlainTask(None, "How many?")) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": "eng"}, "language 'eng' is unknown, did you mean 'en'"),
        ({"threshold": 0}, "threshold is 0"),
        ({"part": "answer"}, "part is 'answer'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(VerifierLookupError, match=message):
        resolve("language", options)


def test_an_opening_without_an_end_stays():
    assert prose(r"we say \( hello") == r"we say \( hello"
    assert count_words("don't 東京 abc") == {"latin": 2, "han": 2}


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("a", {"latin": 1}),
        ("<a", {}),
        ("$", {}),
        ("`", {}),
        ("_", {}),
        (r"\[", {}),
        (r"\( ", {}),
        ("www.", {}),
        ("a_", {}),
        ("你", {"han": 1_000_000}),
        ("```\n", {}),
        ("a1 ", {}),
    ],
)
def test_a_million_characters_of_anything(unit, expected):
    """Work in the square of the length would take hours here."""
    assert count_words(prose(unit * (1_000_000 // len(unit)))) == expected
