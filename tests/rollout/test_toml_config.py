"""Config files: what loads, what is rejected, and how the mistake is named."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rollout.errors import UserError
from rollout.toml_config import describe, load_config, to_toml


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, kw_only=True)
class Shape:
    hidden_size: int = field(default=128, metadata={"description": "width D"})
    num_layers: int = 3


class Reward(Frozen):
    verifier: str = Field(description="registered name or package.module:function")
    weight: float = Field(default=1.0, description="factor of its score")


class Optimizer(Frozen):
    lr: float = Field(default=1e-4, gt=0, description="learning rate")
    kind: Literal["adamw", "muon"] = "adamw"


class Config(Frozen):
    seed: int = Field(default=0, description="seed of everything")
    group_size: int = Field(description="samples per prompt", ge=2)
    name: str | None = None
    optimizer: Optimizer = Optimizer()
    rewards: tuple[Reward, ...] = (Reward(verifier="numeric"), Reward(verifier="format", weight=0.2))
    named: dict[str, Reward] = {}
    shape: Shape = Shape()

    @field_validator("name")
    @classmethod
    def _no_slash(cls, value: str | None) -> str | None:
        if value and "/" in value:
            raise ValueError("may not hold a slash")
        return value

    @model_validator(mode="after")
    def _odd_seed_needs_pair(self) -> Config:
        if self.seed == 13:
            raise ValueError("seed 13 is not used here")
        return self


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return load_config(Config, path, overrides)


def mistakes(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_file_and_defaults(tmp_path: Path) -> None:
    config = load(
        tmp_path, 'group_size = 8\n[optimizer]\nlr = 1e-6\n[shape]\nnum_layers = 5\n[[rewards]]\nverifier = "x"'
    )
    assert (config.group_size, config.optimizer.lr, config.seed) == (8, 1e-6, 0)
    assert config.rewards == (Reward(verifier="x"),)
    assert config.shape == Shape(num_layers=5)


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("seed=7", lambda c: c.seed, 7),
        ("optimizer.lr=3e-5", lambda c: c.optimizer.lr, 3e-5),
        ("optimizer.kind=muon", lambda c: c.optimizer.kind, "muon"),
        ('name="two words"', lambda c: c.name, "two words"),
        ("name=bare", lambda c: c.name, "bare"),
        ("name=a=b", lambda c: c.name, "a=b"),
        ("name=null", lambda c: c.name, None),
        ("name=", lambda c: c.name, ""),
        ("rewards.1.weight=0.5", lambda c: [r.weight for r in c.rewards], [1.0, 0.5]),
        ('rewards=[{verifier="a"}]', lambda c: [r.verifier for r in c.rewards], ["a"]),
        ("named.main.verifier=numeric", lambda c: c.named["main"].verifier, "numeric"),
        ("shape.hidden_size=64", lambda c: c.shape.hidden_size, 64),
    ],
)
def test_override(tmp_path: Path, override: str, read, expected: object) -> None:
    assert read(load(tmp_path, 'group_size = 8\nname = "file"', override)) == expected


def test_later_override_wins_and_indexes_lists_of_the_file(tmp_path: Path) -> None:
    text = 'group_size = 8\n[[rewards]]\nverifier = "x"\nweight = 2.0'
    config = load(tmp_path, text, "rewards.0.weight=3", "rewards.0.weight=4")
    assert config.rewards == (Reward(verifier="x", weight=4.0),)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed", "write key=value"),
        ("=3", "write key=value"),
        ("a..b=3", "write key=value"),
        ("rewards.7.weight=1", "rewards is a list of 2"),
        ("rewards.x.weight=1", "rewards"),
        ("group_size.x=1", "group_size is the value 8, not a table"),
    ],
)
def test_override_that_cannot_be_applied(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(UserError, match=r"override|run\.toml") as caught:
        load(tmp_path, "group_size = 8", override)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("group_sise = 8\ngroup_size = 8", "group_sise: unknown key; did you mean group_size?"),
        ("group_size = 8\n[optimizer]\nlrr = 1", "optimizer.lrr: unknown key; did you mean optimizer.lr?"),
        ("group_size = 8\nhidden_size = 1", "hidden_size: unknown key; did you mean shape.hidden_size?"),
        ("group_size = 8\n[shape]\nhiden_size = 1", "shape.hiden_size: unknown key; did you mean shape.hidden_size?"),
        (
            'group_size = 8\n[[rewards]]\nverifier = "x"\nwieght = 1',
            "rewards.0.wieght: unknown key; did you mean rewards.0.weight?",
        ),
        ("group_size = 8\n[optimizer]\nzzz = 1", "optimizer.zzz: unknown key; known here: lr, kind"),
    ],
)
def test_unknown_key_names_its_path_and_the_nearest(tmp_path: Path, text: str, line: str) -> None:
    assert mistakes(tmp_path, text) == [line]


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    text = 'seed = "x"\nname = "a/b"\n[optimizer]\nlr = -1.0\nkind = "sgd"\nlrr = 2\n[[rewards]]\nweight = "heavy"'
    lines = {line.partition(":")[0]: line for line in mistakes(tmp_path, text)}
    assert lines.keys() == {
        "seed", "name", "optimizer.lr", "optimizer.kind", "optimizer.lrr", "rewards.0.weight", "rewards.0.verifier",
        "group_size",
    }  # fmt: skip
    assert lines["group_size"] == "group_size: is missing and has no default"
    assert lines["seed"].startswith("seed: should be a valid integer")
    assert lines["seed"].endswith("(got 'x')")
    assert lines["name"] == "name: may not hold a slash (got 'a/b')"
    assert lines["optimizer.lr"] == "optimizer.lr: should be greater than 0 (got -1.0)"
    assert lines["optimizer.kind"] == "optimizer.kind: should be 'adamw' or 'muon' (got 'sgd')"


def test_rule_over_the_whole_config_has_no_path(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "group_size = 8\nseed = 13") == ["config: seed 13 is not used here"]


def test_table_where_a_value_belongs_and_the_reverse(tmp_path: Path) -> None:
    lines = mistakes(tmp_path, "group_size = 8\noptimizer = 3\n[seed]\nx = 1")
    assert [line.partition(":")[0] for line in lines] == ["seed", "optimizer"]


def test_missing_file_names_a_sibling(tmp_path: Path) -> None:
    (tmp_path / "quickstart.toml").write_text("")
    with pytest.raises(
        UserError, match=r"quikstart.toml: there is no such config file; did you mean .*quickstart.toml"
    ):
        load_config(Config, tmp_path / "quikstart.toml")


def test_syntax_error_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run.toml: not valid TOML: .*line 2"):
        load(tmp_path, "group_size = 8\nseed = = 3")


def test_folder_or_binary_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be read as a config file"):
        load_config(Config, tmp_path)
    (tmp_path / "weights.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="can't be read as a config file"):
        load_config(Config, tmp_path / "weights.toml")


def test_describe_lists_every_field_once_with_type_default_and_description() -> None:
    rows = {row.path: row for row in describe(Config)}
    assert rows["group_size"][1:] == ("int >= 2", "(required)", "samples per prompt")
    assert rows["optimizer.lr"][1:] == ("float > 0", "0.0001", "learning rate")
    assert rows["optimizer.kind"].type == "'adamw' | 'muon'"
    assert rows["name"][1:3] == ("str | null", "null")
    assert rows["shape.hidden_size"][1:] == ("int", "128", "width D")
    assert rows["rewards.<n>.weight"].description == "factor of its score"
    assert rows["named.<name>.verifier"].default == "(required)"
    assert len(rows) == len(describe(Config))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    seed=st.integers(-(2**40), 2**40).filter(lambda n: n != 13),
    lr=st.floats(1e-9, 1e3),
    name=st.none() | st.text(max_size=20).filter(lambda s: "/" not in s and "\r" not in s),
    weights=st.lists(st.floats(-10, 10), max_size=3),
)
def test_toml_round_trip(tmp_path_factory, seed: int, lr: float, name: str | None, weights: list[float]) -> None:
    config = Config(
        seed=seed,
        group_size=4,
        name=name,
        optimizer=Optimizer(lr=lr),
        rewards=tuple(Reward(verifier="numeric", weight=w) for w in weights),
        named={"a b.c": Reward(verifier="format")},
    )
    path = tmp_path_factory.mktemp("config") / "resolved.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(Config, path) == config


def test_a_config_that_toml_cannot_hold_is_refused() -> None:
    class Optional(Frozen):
        limit: int | None = 5

    with pytest.raises(ValueError, match="changes when it is written as TOML"):
        to_toml(Optional(limit=None))
    assert to_toml(Optional(limit=6)) == "limit = 6\n"


def write(folder: Path, **texts: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)


def test_extends_lies_below_the_files_own_values(tmp_path: Path) -> None:
    write(
        tmp_path,
        low='seed = 1\nname = "low"\ngroup_size = 4\n[optimizer]\nlr = 1.0\nkind = "muon"\n[[rewards]]\nverifier = "a"',
        high='seed = 2\n[optimizer]\nlr = 2.0\n[named.main]\nverifier = "n"\nweight = 3.0',
    )
    config = load(
        tmp_path,
        'extends = ["low.toml", "high.toml"]\nseed = 3\n[named.main]\nweight = 4.0\n[[rewards]]\nverifier = "own"',
    )
    assert (config.seed, config.name, config.group_size) == (3, "low", 4)
    assert config.optimizer == Optimizer(lr=2.0, kind="muon")  # a table is merged, and the later of the two files wins
    assert config.rewards == (Reward(verifier="own"),)  # a list is replaced
    assert config.named == {"main": Reward(verifier="n", weight=4.0)}
    assert "extends" not in to_toml(config)


def test_extends_nests_and_looks_beside_the_file_and_then_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "cwd", shared="group_size = 5\nseed = 9", beside='name = "wrong"')
    write(tmp_path / "configs", beside='extends = "shared.toml"\nname = "beside"', run='extends = "beside.toml"')
    monkeypatch.chdir(tmp_path / "cwd")
    config = load_config(Config, tmp_path / "configs" / "run.toml")
    assert (config.group_size, config.seed, config.name) == (5, 9, "beside")


def test_the_same_file_may_be_extended_twice(tmp_path: Path) -> None:
    write(tmp_path, root="group_size = 4\nseed = 1", a='extends = "root.toml"\nname = "a"', b='extends = "root.toml"')
    assert load(tmp_path, 'extends = ["a.toml", "b.toml"]') == Config(group_size=4, seed=1, name="a")


def test_extends_on_the_command_line_lies_over_what_comes_before(tmp_path: Path) -> None:
    write(tmp_path, own="seed = 1", preset='seed = 2\nname = "preset"\n[optimizer]\nlr = 2.0')
    text = 'extends = "own.toml"\ngroup_size = 8\nname = "file"\n[optimizer]\nkind = "muon"'
    preset = f"extends={tmp_path / 'preset.toml'}"
    config = load(tmp_path, text, "seed=3", preset, "optimizer.lr=5")
    assert (config.seed, config.name, config.group_size) == (2, "preset", 8)
    assert config.optimizer == Optimizer(lr=5.0, kind="muon")
    both = load(tmp_path, text, f'extends=["{tmp_path / "preset.toml"}", "{tmp_path / "own.toml"}"]')
    assert (both.seed, both.name) == (1, "preset")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('extends = "none.toml"', "none.toml: there is no such config file, which {run} extends"),
        ('extends = "bad.toml"', "bad.toml: not valid TOML"),
        ('extends = "run.toml"', "run.toml: extends goes round in a circle: {run} -> {run}"),
        ('extends = "there.toml"', "extends goes round in a circle: {run} -> {folder}/there.toml -> {run}"),
        ("extends = 3", "{run}: extends must be the path of a config file or a list of such paths, not 3"),
        ("extends = []", "must be the path of a config file"),
        ('extends = ["x.toml", ""]', "must be the path of a config file"),
    ],
)
def test_extends_that_cannot_be_followed(tmp_path: Path, text: str, says: str) -> None:
    write(tmp_path, bad="a = = 1", there='extends = "run.toml"')
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert says.format(run=tmp_path / "run.toml", folder=tmp_path) in str(caught.value)


def test_mistakes_in_an_extended_file_name_it(tmp_path: Path) -> None:
    preset = tmp_path / "preset.toml"
    write(tmp_path, preset='sed = 1\n[optimizer]\nlr = -1.0\nkind = "sgd"\n[[rewards]]\nverifier = 7')
    text = 'extends = "preset.toml"\ngroup_size = 1\n[optimizer]\nkind = "adam"'
    assert mistakes(tmp_path, text) == [
        f"sed: unknown key; did you mean seed?, in {preset}",
        "group_size: should be greater than or equal to 2 (got 1)",
        f"optimizer.lr: should be greater than 0 (got -1.0), in {preset}",
        "optimizer.kind: should be 'adamw' or 'muon' (got 'adam')",
        f"rewards.0.verifier: should be a valid string (got 7), in {preset}",
    ]
    overridden = mistakes(tmp_path, text, "optimizer.lr=-2", "rewards.0.verifier=8", "sed=2")
    assert not any("preset" in line for line in overridden)
    over = mistakes(tmp_path, "group_size = 1\n[optimizer]\nlr = -3.0", f"extends={preset}")
    assert f"optimizer.lr: should be greater than 0 (got -1.0), in {preset}" in over
    assert "group_size: should be greater than or equal to 2 (got 1)" in over


def test_a_table_names_the_file_only_if_all_of_it_is_from_there(tmp_path: Path) -> None:
    preset = tmp_path / "preset.toml"
    write(tmp_path, preset="group_size = 4\n[optimiser]\nlr = 1.0")
    line = "optimiser: unknown key; did you mean optimizer?"
    assert mistakes(tmp_path, 'extends = "preset.toml"') == [f"{line}, in {preset}"]
    assert mistakes(tmp_path, 'extends = "preset.toml"\n[optimiser]\nkind = "muon"') == [line]


def test_extends_is_a_key_of_the_top_alone_and_a_near_miss_is_named(tmp_path: Path) -> None:
    assert mistakes(tmp_path, 'group_size = 2\nextend = "x.toml"') == ["extend: unknown key; did you mean extends?"]
    nested = mistakes(tmp_path, 'group_size = 2\n[optimizer]\nextends = "x.toml"')
    assert nested == ["optimizer.extends: unknown key; known here: lr, kind"]
