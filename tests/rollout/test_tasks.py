"""Task sources: what a row becomes, what each step takes, and what a person reads when the data is wrong."""

import json
import socket
from pathlib import Path

import pytest
from pydantic import ValidationError

from rollout.errors import UserError
from rollout.tasks import DataConfig, load_tasks

GSM8K = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "gsm8k"
GSM8K_ANSWER = r"####\s*(.+?)\s*$"
ROWS = [{"question": f"{i} + 1?", "answer": str(i + 1), "level": i % 2, "key": f"k{i}"} for i in range(6)]


@pytest.fixture
def gsm8k():
    if not GSM8K.is_dir():
        pytest.skip(f"the GSM8K rows are not there: {GSM8K}")
    return GSM8K


@pytest.fixture
def offline_datasets(monkeypatch, tmp_path):
    """The datasets library, its cache in a temporary folder and every connection refused."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def refuse(*_):
        raise AssertionError("a data source tried to open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return datasets


def write_lines(path, lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def jsonl(path, **options):
    return load_tasks(DataConfig(source="jsonl", path=path, **options))


def ids(tasks):
    return [task.task_id for task in tasks]


def test_gsm8k_as_published(gsm8k):
    source = jsonl(gsm8k / "test.jsonl", answer_pattern=GSM8K_ANSWER)
    assert len(source) == 1319
    first = source.task(0)
    assert first.task_id == "gsm8k-test/0"
    assert str(first.prompt).startswith("Janet’s ducks lay 16 eggs per day.")
    assert first.answer == "18"
    answers = [source.task(i).answer for i in range(len(source))]
    assert all("#" not in answer and "\n" not in answer for answer in answers)
    assert sum(answer.replace(",", "").lstrip("-").replace(".", "").isdigit() for answer in answers) == 1319


def test_gsm8k_steps_are_epochs_of_different_rows(gsm8k):
    source = jsonl(gsm8k / "test.jsonl", answer_pattern=GSM8K_ANSWER, max_rows=40)
    epoch = [task_id for step in range(5) for task_id in ids(source.for_step(1, step, 8))]
    assert sorted(epoch) == sorted(f"gsm8k-test/{row}" for row in range(40))
    assert ids(source.for_step(1, 3, 8)) == epoch[24:32]


def test_columns_ids_and_metadata(tmp_path):
    path = write_lines(tmp_path / "toy.jsonl", ROWS)
    source = jsonl(path, name="toy", id_column="key", metadata_columns=["level"])
    task = source.task(3)
    assert (task.task_id, task.prompt, task.answer, task.metadata) == ("toy/k3", "3 + 1?", "4", {"level": 1})
    assert jsonl(path, max_rows=2).task(1).task_id == f"{tmp_path.name}-toy/1"
    with pytest.raises(IndexError):
        source.task(6)


def test_a_path_reaches_into_nested_columns(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "Hi", "name": "x"}], "reward": {"truth": "ho"}}]
    source = jsonl(write_lines(tmp_path / "d.jsonl", rows), prompt_column="prompt", answer_column="reward.truth")
    assert source.task(0).prompt == [{"role": "user", "content": "Hi"}]
    assert source.task(0).answer == "ho"


def test_blank_lines_and_a_byte_order_mark_do_not_shift_rows(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n\n".join(json.dumps(row).encode() for row in ROWS) + b"\r\n\n")
    source = jsonl(path)
    assert [source.task(i).prompt for i in range(len(source))] == [row["question"] for row in ROWS]


LONG = {"question": "Q", "answer": "text without the mark " * 20}


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([], {}, "d.jsonl: the dataset is empty"),
        (["\n", "  \n"], {}, "d.jsonl: the dataset is empty"),
        ([ROWS[0], '{"question": \n'], {}, r"d.jsonl, line 2 \(row 1\): not valid JSON"),
        ([ROWS[0], "\n", "[1, 2]\n"], {}, r"line 3 \(row 1\): a list where .* one object a line"),
        (
            [{"question": "Q", "answers": 1}],
            {},
            "no column 'answer'; .*'question', 'answers'; did you mean 'answers'.*answer_column",
        ),
        (
            [{"problem": "Q", "answer": 1}],
            {},
            "no column 'question'; the columns are 'problem', 'answer'.*prompt_column",
        ),
        ([ROWS[0], {"question": "Q", "answer": None}], {}, "line 2 .*column 'answer' is null"),
        ([{"question": " ", "answer": 1}], {}, "column 'question': the prompt is empty"),
        ([{"question": 5, "answer": 1}], {}, "a prompt is a text or a list"),
        ([{"question": [{"role": "user"}], "answer": 1}], {}, "a prompt is a text or a list"),
        (
            [{"question": "Q", "answer": "no mark"}],
            {"answer_pattern": GSM8K_ANSWER},
            "line 1 .*does not match answer_pattern",
        ),
        ([LONG], {"answer_pattern": GSM8K_ANSWER}, r"text without the .* \.\.\. .*mark '$"),
        ([{"question": "Q", "answer": 5}], {"answer_pattern": GSM8K_ANSWER}, "answer_pattern needs a text, not 5"),
        ([ROWS[0], ROWS[1], ROWS[0]], {"id_column": "key"}, r"line 3 .*k0' is also that of .*line 1"),
        (
            [{"question": "Q", "answer": {"a": 1}}],
            {"answer_column": "answer.b"},
            "no column 'b' in 'answer'; the columns are 'a'",
        ),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_column(tmp_path, lines, options, message):
    path = write_lines(tmp_path / "d.jsonl", lines)
    with pytest.raises(UserError, match=message):
        jsonl(path, **options)


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"question": "\xff", "answer": 1}\n')
    with pytest.raises(UserError, match="line 2"):
        jsonl(path)


def test_a_missing_file_is_named(tmp_path):
    for kind in ("jsonl", "parquet", "hf"):
        with pytest.raises(UserError, match=r"gone\.data: there is no such file"):
            load_tasks(DataConfig(source=kind, path=tmp_path / "gone.data"))


def test_parquet_and_a_folder_of_it(tmp_path, offline_datasets):
    folder = tmp_path / "shards"
    folder.mkdir()
    offline_datasets.Dataset.from_list(ROWS[:4]).to_parquet(folder / "a.parquet")
    offline_datasets.Dataset.from_list(ROWS[4:]).to_parquet(folder / "b.parquet")
    config = DataConfig(source="parquet", path=folder, name="toy", metadata_columns=("level",))
    source = load_tasks(config)
    assert [source.task(i).answer for i in range(len(source))] == ["1", "2", "3", "4", "5", "6"]
    assert source.task(5).metadata == {"level": 1}
    one = load_tasks(config.model_copy(update={"path": folder / "b.parquet"}))
    assert ids([one.task(0), one.task(1)]) == ["toy/0", "toy/1"]
    assert len(one) == 2


def test_a_parquet_row_without_answer_is_named(tmp_path, offline_datasets):
    path = tmp_path / "d.parquet"
    offline_datasets.Dataset.from_list([ROWS[0], {**ROWS[1], "answer": None}]).to_parquet(path)
    with pytest.raises(UserError, match=r"d\.parquet, row 1: column 'answer' is null"):
        load_tasks(DataConfig(source="parquet", path=path))


def test_broken_parquet_and_empty_folders_are_named(tmp_path, offline_datasets):
    path = tmp_path / "d.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"d\.parquet: can't be read as Parquet"):
        load_tasks(DataConfig(source="parquet", path=path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \*.parquet"):
        load_tasks(DataConfig(source="parquet", path=tmp_path / "empty"))


def test_local_hugging_face_datasets_by_split(tmp_path, offline_datasets):
    saved = offline_datasets.DatasetDict(
        train=offline_datasets.Dataset.from_list(ROWS[:4]), test=offline_datasets.Dataset.from_list(ROWS[4:])
    )
    saved.save_to_disk(tmp_path / "saved")
    hub = tmp_path / "hub"
    hub.mkdir()
    write_lines(hub / "train.jsonl", ROWS[:4])
    write_lines(hub / "test.jsonl", ROWS[4:])
    for folder in ("saved", "hub"):
        config = DataConfig(source="hf", path=tmp_path / folder, split="test")
        source = load_tasks(config)
        assert [source.task(i).prompt for i in range(len(source))] == ["4 + 1?", "5 + 1?"]
        assert source.task(0).task_id == f"{folder}-test/0"
        with pytest.raises(UserError, match=r"no split 'dev'; the splits are .*'t"):
            load_tasks(config.model_copy(update={"split": "dev"}))


def test_a_file_is_not_a_hugging_face_folder(tmp_path, offline_datasets):
    path = write_lines(tmp_path / "d.jsonl", ROWS)
    with pytest.raises(UserError, match="a Hugging Face dataset is a folder"):
        load_tasks(DataConfig(source="hf", path=path))
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="bare: can't be read"):
        load_tasks(DataConfig(source="hf", path=tmp_path / "bare"))


def test_a_generator_gives_fresh_problems_each_step_and_the_same_again():
    source = load_tasks(DataConfig(source="generator", generator="arithmetic"))
    steps = [source.for_step(0, step, 4) for step in range(3)]
    assert len({task.task_id for step in steps for task in step}) == 12
    assert source.for_step(0, 1, 4) == steps[1] != source.for_step(1, 1, 4)
    assert source.task(5) == source.task(5)
    assert len(source) > 10**9


def test_a_generator_with_max_rows_is_a_fixed_set():
    source = load_tasks(DataConfig(source="generator", generator="arithmetic", split="heldout", max_rows=6))
    everything = [source.task(i) for i in range(6)]
    taken = source.for_step(0, 0, 3) + source.for_step(0, 1, 3)
    assert sorted(ids(taken)) == sorted(ids(everything))
    with pytest.raises(IndexError):
        source.task(6)


def test_generator_options_are_checked():
    config = DataConfig(source="generator", generator="arithmetic", options={"kind": ["sum_product"]})
    with pytest.raises(UserError, match=r"no option 'kind'.*did you mean 'kinds'"):
        load_tasks(config)
    with pytest.raises(UserError, match="does not take these options"):
        load_tasks(config.model_copy(update={"options": {"kinds": ["nonsense"]}}))
    source = load_tasks(config.model_copy(update={"options": {"kinds": ["sum_product"]}}))
    assert {task.metadata["kind"] for task in source.for_step(0, 0, 8)} == {"sum_product"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "csv", "path": "x"}, "source"),
        ({"source": "jsonl"}, "needs a path"),
        ({"source": "jsonl", "path": "x", "split": "test"}, "has no split 'test'"),
        ({"source": "jsonl", "path": "x", "generator": "arithmetic"}, "go with source 'generator'"),
        ({"source": "jsonl", "path": "x", "answer_pattern": "("}, "not a regular expression"),
        ({"source": "jsonl", "path": "x", "answer_pattern": "(a)(b)"}, "exactly one group"),
        ({"source": "jsonl", "path": "x", "max_rows": 0}, "max_rows"),
        ({"source": "jsonl", "path": "x", "colour": 1}, "colour"),
        ({"source": "generator", "generator": "arithmetics"}, "'arithmetic'"),
        ({"source": "generator", "generator": "arithmetic", "path": "x"}, "takes no path"),
        ({"source": "generator", "generator": "arithmetic", "split": "test"}, "'train' or 'heldout'"),
    ],
)
def test_a_bad_config_is_refused_before_any_file_is_opened(options, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**options)


def test_every_field_is_described():
    assert [name for name, field in DataConfig.model_fields.items() if not field.description] == []
