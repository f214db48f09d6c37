"""Rows from folders, several files, and the hub."""

import bz2
import gzip
import shutil
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
from row_files import ROWS, load, write

from lib.cli.config import TrainConfig
from lib.cli.parsing import parse_arguments
from lib.data.splits import load_splits
from lib.data.tasks import IGNORED, TASKS
from lib.errors import InputError
from lib.hub.reach import go_offline_if_unreachable
from train_mrpc import main


def glue_folder(folder, task, num_rows=4):
    """Rows of a GLUE task as the hub lays them out, in Parquet."""
    spec = TASKS[task]
    for split in ("train", *spec.validation, *spec.test):
        labels = [0, 1, 0, 1][:num_rows] if spec.labels else [0.0, 5.0, 2.5, 1.25][:num_rows]
        if split in spec.test:
            labels = [-1 if spec.labels else -1.0] * num_rows
        content = {name: [f"{name} {row}" for row in range(num_rows)] for name in spec.columns}
        rows = datasets.Dataset.from_dict(
            {**content, "label": labels, "idx": list(range(num_rows))}
        )
        rows.to_parquet(str(folder / f"{split}.parquet"))
    return folder


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_glue_task_is_read(tmp_path, task):
    splits = load_splits(str(glue_folder(tmp_path, task)), task_name=task)
    assert list(splits.validation) == list(TASKS[task].validation)
    assert list(splits.test) == list(TASKS[task].test)
    assert splits.train.column_names == [*TASKS[task].columns, "labels"]
    assert set(splits.test[TASKS[task].test[0]]["labels"][:]) == {IGNORED}


@pytest.fixture(params=["hub", "saved", "parquet", "demo", "files"])
def source(request, tmp_path, monkeypatch):
    """Pairs from each kind of place that rows can come from, with a second column of labels."""
    rows = [{**row, "reversed": 1 - row["label"]} for row in ROWS]
    split = datasets.Dataset.from_list(rows)
    if request.param == "files":
        path = str(write(tmp_path, "csv", rows))
        return {"train": path, "validation": path}
    if request.param == "parquet" or request.param == "demo":
        for name in ("train", "validation"):
            split.to_parquet(str(tmp_path / f"{name}.parquet"))
        if request.param == "demo":
            monkeypatch.setattr("lib.demo.corpus.write_corpus", lambda _: tmp_path)
            return "demo"
    else:
        saved = datasets.DatasetDict(train=split, validation=split)
        saved.save_to_disk(str(tmp_path / "saved"))
        if request.param == "hub":
            saved = datasets.load_from_disk(str(tmp_path / "saved"))
            builder = SimpleNamespace(
                config=SimpleNamespace(data_files=None),
                download_and_prepare=lambda: None,
                as_dataset=lambda: saved,
            )
            monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
            return "nyu-mll/glue"
        return str(tmp_path / "saved")
    return str(tmp_path)


def test_the_named_columns_are_read_from_every_source(source):
    loaded = load_splits(
        source, task_name="mrpc", text_columns=("sentence2",), label_column="reversed"
    )
    assert loaded.task.columns == ("sentence2",)
    assert loaded.train.column_names == ["sentence2", "labels"]
    assert loaded.train["sentence2"][0] == "c, d"
    assert loaded.train["labels"][:] == [0, 1, 0]
    assert loaded.validation["validation"]["labels"][:] == [0, 1, 0]


@pytest.mark.parametrize(
    ("columns", "remedy"),
    [
        (
            {"text_columns": ("quote",)},
            "no column quote .found: .*; name yours with --text_columns",
        ),
        ({"label_column": "stars"}, "no column stars .found: .*; name yours with --label_column"),
    ],
)
def test_names_a_column_that_the_source_lacks(source, columns, remedy):
    with pytest.raises(InputError, match=remedy) as error:
        load_splits(source, task_name="mrpc", **columns)
    assert "sentence1, sentence2, label, reversed" in str(error.value)


def test_the_demo_takes_named_columns(tmp_path, capsys):
    flags = ["--demo", "--dry_run", "--max_train_samples=8", f"--output_dir={tmp_path / 'out'}"]
    main(parse_arguments([*flags, "--text_columns", "sentence2"]))
    printed = capsys.readouterr().out
    assert "first row              sentence2: " in printed
    assert "sentence1" not in printed
    with pytest.raises(InputError, match="no column quote .found: sentence1, sentence2, label"):
        main(parse_arguments([*flags, "--text_columns", "quote"]))


def test_a_saved_dataset_dict_is_read(tmp_path):
    split = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=split, validation=split).save_to_disk(str(tmp_path / "saved"))
    assert len(load_splits(str(tmp_path / "saved"), task_name="mrpc").train) == 3


def test_a_folder_without_a_validation_split(tmp_path):
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(InputError, match="has no validation split .found: train."):
        load_splits(str(tmp_path), task_name="mrpc")


@pytest.fixture
def downloaded(tmp_path):
    """What `hf download nyu-mll/glue --local-dir glue` makes, with two of the configurations."""
    for task in ("mrpc", "mnli"):
        flat = glue_folder(tmp_path / task, task)
        for path in flat.glob("*.parquet"):
            path.rename(flat / f"{path.stem}-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("# GLUE\n")
    return tmp_path


@pytest.mark.parametrize("task", ["mrpc", "mnli"])
def test_a_download_of_the_hub_is_read_by_configuration(downloaded, task):
    splits = load_splits(str(downloaded), task_name=task)
    assert splits.train[TASKS[task].columns[0]][:2] == [
        f"{TASKS[task].columns[0]} {row}" for row in (0, 1)
    ]
    assert list(splits.validation) == list(TASKS[task].validation)
    assert len(splits.test[TASKS[task].test[0]]) == 4


def in_cache_of_the_hub(monkeypatch, folder, cache, *, incomplete=False):
    """Lay out a folder as the hub's cache does, with its listing of the repository."""
    commit = "1" * 40
    repository = cache / "datasets--nyu-mll--glue"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    snapshot = repository / "snapshots" / commit
    entries = {
        str(path.relative_to(snapshot)): TreeCacheEntry(path.stat().st_size, "0", None, None, None)
        for path in snapshot.rglob("*.parquet")
    }
    write_tree_cache(str(repository), commit, entries)
    return snapshot


def test_a_data_set_in_the_cache_of_the_hub_is_read_offline(
    downloaded, tmp_path_factory, monkeypatch
):
    snapshot = in_cache_of_the_hub(monkeypatch, downloaded, tmp_path_factory.mktemp("hub"))
    shutil.rmtree(snapshot / "mnli")  # another configuration need not be there
    go_offline_if_unreachable("demo", None, "nyu-mll/glue")
    splits = load_splits("nyu-mll/glue", task_name="mrpc")
    assert splits.train["sentence1"][:] == [f"sentence1 {row}" for row in range(4)]
    assert splits.source == "nyu-mll/glue"
    with pytest.raises(InputError, match="nyu-mll/glue is cached incompletely"):
        load_splits("nyu-mll/glue", task_name="mnli")
    (snapshot / "mrpc" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(InputError, match="nyu-mll/glue is cached incompletely.*--prefetch"):
        load_splits("nyu-mll/glue", task_name="mrpc")


@pytest.mark.parametrize(
    "layout", ["train.jsonl", "data/train.csv", "train/0000.tsv", "train-1.csv.gz"]
)
def test_a_folder_may_hold_any_format(tmp_path, layout):
    path = tmp_path / layout
    path.parent.mkdir(exist_ok=True)
    ending = layout.partition(".")[2].removesuffix(".gz")
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in (0, 1)]
    written = write(tmp_path, ending, rows).read_bytes()
    (tmp_path / f"rows.{ending}").unlink()
    path.write_bytes(gzip.compress(written) if layout.endswith(".gz") else written)
    other = path.with_name(path.name.replace("train", "dev"))
    if other == path:
        other = tmp_path / "dev" / path.name
        other.parent.mkdir()
    shutil.copy(path, other)
    (tmp_path / "dataset_info.json").write_text("{}")
    splits = load_splits(str(tmp_path), task_name="mrpc")
    assert splits.train[:] == splits.validation["validation"][:]
    assert splits.train[:] == {"sentence1": ["a", "a"], "sentence2": ["b", "b"], "labels": [0, 1]}


def test_a_folder_with_a_split_in_two_formats(tmp_path):
    for ending in ("csv", "jsonl"):
        write(tmp_path, ending, ROWS).rename(tmp_path / f"train.{ending}")
    with pytest.raises(InputError, match="train.csv and .*train.jsonl both hold rows of the train"):
        load_splits(str(tmp_path), task_name="mrpc")


def compressed(path, ending):
    content = path.read_bytes()
    target = path.with_name(path.name + ending)
    if ending == ".zst":
        with pyarrow.CompressedOutputStream(str(target), "zstd") as file:
            file.write(content)
    else:
        target.write_bytes({".gz": gzip, ".bz2": bz2}[ending].compress(content))
    return target


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".zst"])
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json"])
def test_compressed_files_give_the_same_rows(tmp_path, ending, compression):
    rows = [{**row, "sentence2": row["sentence2"].replace("\n", " ")} for row in ROWS]
    plain = write(tmp_path, ending, rows)
    assert load(compressed(plain, compression)).train[:] == load(plain).train[:]


def test_several_files_are_one_split(tmp_path):
    """Rows follow one another in the order of the files, and errors name the file."""
    for name, labels in (("b1", (2, 1)), ("b2", (1, 2.5)), ("b3", (0, None))):
        rows = [{"text": f"{name} {label}", "label": label} for label in labels]
        write(tmp_path, "jsonl", rows).rename(tmp_path / f"{name}.jsonl")
    dev = str(tmp_path / "b1.jsonl")
    pattern = str(tmp_path / "b[12].jsonl")
    train = TrainConfig(train_file=pattern, validation_file=dev).files()["train"]
    splits = load_splits({"train": train, "validation": dev}, task_name=None)
    assert splits.train[:] == {
        "text": ["b1 2", "b1 1", "b2 1", "b2 2.5"],
        "labels": [2.0, 1.0, 1.0, 2.5],
    }
    folder = TrainConfig(train_file=str(tmp_path), validation_file=dev).files()["train"]
    with pytest.raises(InputError, match="b3.jsonl, row 2, column label: the label is missing"):
        load_splits({"train": folder, "validation": dev}, task_name=None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["*.xyz"], "--train_file .*xyz: no file has such a name"),
        (["a.csv", "*.csv"], "--train_file names .*a.csv twice"),
        (["empty"], "the folder holds no file of rows; known: .csv, .tsv"),
        (["*"], "notes.txt: its extension does not name a format"),
        (["a.parquet.gz"], "a.parquet.gz: its extension does not name a format"),
    ],
)
def test_what_stands_for_no_files(tmp_path, given, message):
    write(tmp_path, "csv", ROWS).rename(tmp_path / "a.csv")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    files = [str(tmp_path / name) for name in given]
    with pytest.raises(InputError, match=message):
        TrainConfig(train_file=files, validation_file=str(tmp_path / "a.csv"))


def test_a_folder_without_data(tmp_path):
    with pytest.raises(InputError, match="has no train.parquet.* folder mrpc .found: nothing"):
        load_splits(str(tmp_path), task_name="mrpc")


def test_no_hub_and_nothing_cached_names_the_remedy():
    with pytest.raises(InputError, match="nyu-mll/glue .mrpc. is neither cached nor .*--prefetch"):
        load_splits("nyu-mll/glue", task_name="mrpc")
