"""The code in docs/verifiers.md runs as it stands there, and its tables name what exists."""

import inspect
import re
from pathlib import Path

import pytest

from verifiers import known_names
from verifiers.registry import BUILT_IN, import_object
from verifiers.testing import LAWS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "verifiers.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_from_nothing_to_a_tested_verifier_and_on(tmp_path, monkeypatch, capsys):
    verifier, test, *others = CODE
    assert sum(1 for line in (verifier + test).splitlines() if line.strip()) <= 15
    (tmp_path / "sorting.py").write_text(verifier)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    exec(compile(test, "test_sorting.py", "exec"), {})
    assert "verifier sorting:sorted_words: 0 of 9 laws broken" in capsys.readouterr().out
    names = {"__name__": "docs_example"}
    for number, code in enumerate(others):
        exec(compile(code, f"example {number}", "exec"), names)
    assert "near" in known_names()


def test_the_tables_name_every_built_in_its_options_and_every_law():
    table = TEXT.partition("## Built in")[2].partition("## Rewards")[0]
    rows = {cells[1]: cells[3] for line in table.splitlines() if len(cells := line.split("|")) == 5}
    documented = {name: options for key, options in rows.items() for name in re.findall(r"`(\w+)`", key)}
    assert set(documented) == set(BUILT_IN)
    for name, options in documented.items():
        found = import_object(BUILT_IN[name])
        known = set(inspect.signature(found).parameters) if inspect.isclass(found) else set()
        assert set(re.findall(r"`(\w+)`", options)) <= known, name
        if name not in ("code", "trl", "verl", "reasoning_gym"):
            assert set(re.findall(r"`(\w+)`", options)) == known, name
    laws = TEXT.partition("| law |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", laws, re.MULTILINE) == list(LAWS)


@pytest.mark.parametrize("key", ["num_workers", "timeout_s", "memory_limit_mb", "max_error_share"])
def test_config_keys_are_those_of_the_config(key):
    from grpo.config import ScoringConfig

    assert f"`scoring.{key}`" in TEXT
    assert key in ScoringConfig.model_fields
