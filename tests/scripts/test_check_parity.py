"""The table of recorded answers: what it counts, and when it fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.check_parity import main

ROOT = Path(__file__).resolve().parents[2]
PARITY = ROOT / "tests" / "grpo" / "parity"


@pytest.fixture(scope="module")
def cases():
    return json.loads((PARITY / "trl_more.json").read_text())[:3]


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_every_case_of_a_folder_is_counted(capsys):
    assert main([str(PARITY)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines[1:]] == [
        ["trl_more.json", "20", "0"],
        ["verl_more.json", "41", "0"],
        ["total", "61", "0"],
    ]
    assert all(float(worst) < 1e-12 for line in lines[1:] for worst in line[3:])


def test_it_runs_as_a_file():
    done = subprocess.run(
        [sys.executable, "scripts/check_parity.py", str(PARITY)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "61" in done.stdout


def test_a_wrong_answer_fails_and_is_shown(tmp_path, capsys, cases):
    write(tmp_path, "good.json", cases)
    write(tmp_path, "wrong.json", [cases[0], {**cases[1], "loss": cases[1]["loss"] + 1e-5}])
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "FAILED wrong.json:1: differs by" in out
    assert out.count("FAILED") == 1
    assert ["total", "5", "1"] in [line.split()[:3] for line in out.splitlines()]


def test_a_difference_just_above_the_bound_fails(tmp_path, cases):
    for gap, status in ((0.5e-8, 0), (2e-8, 1)):
        write(tmp_path, "a.json", [{**cases[0], "loss": cases[0]["loss"] + gap}])
        assert main([str(tmp_path)]) == status


def test_an_unknown_option_and_a_broken_case_fail_without_a_traceback(tmp_path, capsys, cases):
    unknown = {**cases[0], "config": {**cases[0]["config"], "loss_type": "ppo2"}}
    write(tmp_path, "a.json", [unknown, 7, {"source": "trl"}, cases[0]])
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "a.json:0: TRL option loss_type = 'ppo2'" in out
    assert "a.json:1: not a case but int" in out
    assert "a.json:2: the case has no 'config'" in out
    assert "a.json:3" not in out


def test_a_broken_file_fails_beside_a_good_one(tmp_path, capsys, cases):
    write(tmp_path, "broken.json", '[{"source": ')
    write(tmp_path, "good.json", cases)
    assert main([str(tmp_path)]) == 1
    assert "FAILED broken.json: cannot be read as JSON" in capsys.readouterr().out


def test_a_file_without_cases_is_left_out_and_no_case_at_all_fails(tmp_path, capsys, cases):
    write(tmp_path, "notes.json", {"about": "something else"})
    assert main([str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "notes.json: holds no case" in captured.out
    assert "no case in" in captured.err
    write(tmp_path, "cases.json", {"cases": cases})
    assert main([str(tmp_path)]) == 0


def test_a_missing_folder_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "nowhere is not a folder" in capsys.readouterr().err
