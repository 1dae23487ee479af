"""The card says what the counts say, in Markdown that shows as tables, with a plot that is the same every time."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from distill.card import funnel_svg, render_card, write_card
from distill.funnel import Funnel
from distill.select import SelectConfig, SelectionResult, select
from tests.distill.trace_builders import Scorer, trace


def made(tmp_path: Path) -> SelectionResult:
    traces = [
        trace("a", num_tokens=10, source="one"),
        trace("b", num_tokens=30, source="one"),
        trace("c", finish_reason="length", source="two", teacher="a | b"),
        trace("d", answer_text=r"\boxed{5}", source="two"),
        trace("e", num_tokens=20, source="two", teacher="a | b"),
    ]
    sources = {"one": {"traces": 2, "lost": {"broken row": 1}}, "two": {"traces": 3, "lost": {}}}
    config = SelectConfig(order=("finished", "verified_correct"))
    return select(traces, config, tmp_path, pool=Scorer(), sources=sources)


def tables(markdown: str) -> list[list[list[str]]]:
    """Cells of every table, heads first."""
    found = re.findall(r"(?:^\|.*\|\n)+", markdown, re.MULTILINE)
    cells = [[re.split(r"(?<!\\)\|", line.strip("|")) for line in block.strip().split("\n")] for block in found]
    return [[[cell.strip() for cell in line] for line in [rows[0], *rows[2:]]] for rows in cells]


def test_the_card_has_the_funnels_numbers(tmp_path: Path) -> None:
    card = write_card(tmp_path, "my traces", made(tmp_path), facts={"commit": "abc"}, config_toml='name = "my"\n')
    text = card.read_text(encoding="utf-8")
    funnel, reasons, sources, made_by = tables(text)
    assert funnel == [
        ["filter", "in", "dropped", "kept", "of those in"],
        ["gathered", "6", "1", "5", "83.3%"],
        ["finished", "5", "1", "4", "80.0%"],
        ["verified_correct", "4", "1", "3", "75.0%"],
    ]
    assert reasons[1:] == [
        ["gathered", "broken row", "1"],
        ["finished", "cut off at the longest length", "1"],
        ["verified_correct", "wrong answer", "1"],
    ]
    assert sources[1:] == [
        ["one", "3", "2", "66.7%", "gathered 1"],
        ["two", "3", "1", "33.3%", "finished 1, verified_correct 1"],
    ]
    assert made_by[1:] == [
        ["teacher of one", "teacher (2 traces)"],
        ["teacher of two", r"a \| b (1 traces)"],
        ["commit", "abc"],
    ]
    assert "3 worked answers to 3 questions, selected from 5." in text
    assert "shortest 10, median 20, 90 % 30, longest 30; 60 in all." in text
    assert '```toml\nname = "my"\n```' in text
    assert "(funnel.svg)" in text
    assert (tmp_path / "funnel.svg").exists()


def test_a_viewer_is_told_which_file_is_the_data(tmp_path: Path) -> None:
    text = render_card("Ann's traces", made(tmp_path), {}, "")
    assert text.startswith(
        "---\npretty_name: 'Ann''s traces'\nconfigs:\n- config_name: default\n  data_files: traces.parquet\n"
    )


def test_what_was_not_compared_with_evaluations_says_so(tmp_path: Path) -> None:
    assert "**Not decontaminated**" in render_card("x", made(tmp_path), {}, "")
    (tmp_path / "exam.jsonl").write_text('{"question": "Compute 1 + 2"}\n')
    sets = {"exam": {"path": tmp_path / "exam.jsonl"}}
    config = SelectConfig(order=("decontaminated",), decontaminated={"sets": sets})
    clean = render_card("x", select([trace(question="Compute 1+2?")], config, tmp_path), {}, "")
    assert "**Not decontaminated**" not in clean
    assert "1 hits, each with both texts, are in `decontamination.jsonl`" in clean


def test_the_plot_has_a_bar_for_each_filter_and_is_the_same_again(tmp_path: Path) -> None:
    funnel = made(tmp_path).funnel
    svg = funnel_svg(funnel)
    texts = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text and not text[0].isdigit()] == [
        "in",
        "gathered",
        "finished",
        "verified correct",
    ]
    assert [text for text in texts if text and text[0].isdigit()] == ["6  100.0%", "5  83.3%", "4  66.7%", "3  50.0%"]
    assert svg == funnel_svg(Funnel.from_dict(funnel.to_dict()))


def test_a_card_of_nothing_is_a_card(tmp_path: Path) -> None:
    result = select([], SelectConfig(order=("finished",)), tmp_path)
    text = write_card(tmp_path, "empty", result).read_text()
    assert "0 worked answers to 0 questions, selected from 0." in text
    assert "None was." in text
    assert ["finished", "0", "0", "0", "-"] in tables(text)[0]
