"""The demo corpus, its bundled model, and the pretraining of that model."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from lib.demo import corpus, generator


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Undo the process-wide settings of the pretraining."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def test_the_corpus_imports_nothing_heavy() -> None:
    code = (
        "import sys, lib.demo.corpus; "
        "sys.exit(bool({'torch', 'datasets', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_pairs_depend_only_on_the_arguments() -> None:
    pairs = generator.make_pairs(300, seed=1)
    assert pairs == generator.make_pairs(300, seed=1)
    assert pairs[:100] == generator.make_pairs(100, seed=1)
    assert pairs[:100] != generator.make_pairs(100, seed=2)
    assert [pair["idx"] for pair in pairs] == list(range(300))


def test_corpus_and_model_are_those_of_the_stated_figures() -> None:
    """Other pairs or weights would need the figures in the docstrings measured again."""
    digest = hashlib.sha256()
    for name in corpus.SPLITS:
        digest.update(json.dumps(corpus.load_split(name)).encode())
    assert digest.hexdigest() == "b8448c63ec73a6c795e8b27133eb10d4e9091f5d1fda6fbfcf647cea55ee2d7a"
    weights = (corpus.MODEL_DIR / "model.safetensors").read_bytes()
    assert (
        hashlib.sha256(weights).hexdigest()
        == "cb3fee91c7b8e28f58591291d665c0be8ac3452b766b85d3e3c1967dd310b293"
    )


def test_splits_and_pretraining_share_no_pair() -> None:
    from lib.demo.pretrain import pair_stage_pairs, word_stage_pairs

    texts = [
        (pair["sentence1"], pair["sentence2"])
        for name in corpus.SPLITS
        for pair in corpus.load_split(name)
    ]
    assert len(texts) == len(set(texts)) == sum(split.num_pairs for split in corpus.SPLITS.values())
    taken = {frozenset(text) for text in texts}
    for others in (word_stage_pairs(3000), pair_stage_pairs(3000)):
        assert len(others) > 2900
        assert not taken & {frozenset((p["sentence1"], p["sentence2"])) for p in others}


def test_pretraining_drops_a_pair_of_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    from lib.demo import pretrain

    reserved = corpus.load_split("validation")[0]
    reversed_pair = {
        "sentence1": reserved["sentence2"],
        "sentence2": reserved["sentence1"],
        "label": 1,
    }
    free = {"sentence1": "One.", "sentence2": "Another.", "label": 0}
    splits = {name: corpus.load_split(name) for name in corpus.SPLITS}
    monkeypatch.setattr(corpus, "load_split", splits.__getitem__)
    monkeypatch.setattr(
        generator, "make_pairs", lambda *args, **kwargs: [reserved, free, reversed_pair]
    )
    assert pretrain.pair_stage_pairs(3) == [free]
    assert pretrain.word_stage_pairs(3) == [free]


def test_labels_of_the_pretraining_stages() -> None:
    from lib.demo.pretrain import pair_stage_pairs, word_stage_pairs

    assert {pair["label"] for pair in word_stage_pairs(1000)} == {1}
    labels = [pair["label"] for pair in pair_stage_pairs(1000)]
    assert 0.45 < sum(labels) / len(labels) < 0.55


def test_defaults_are_a_configuration_for_the_bundled_model() -> None:
    from lib.cli.config import TrainConfig

    config = TrainConfig(**corpus.DEFAULTS)  # type: ignore[arg-type]
    assert config.dataset_name == "demo"
    assert Path(config.model_name_or_path, "model.safetensors").is_file()


def test_baselines_match_the_docstring_and_stay_low() -> None:
    scores = corpus.baselines()
    assert corpus.__doc__ is not None
    for name, score in scores.items():
        line = next(line for line in corpus.__doc__.splitlines() if f"    {name}" in line)
        assert float(line.split()[-1]) == pytest.approx(score, abs=5e-5)
        assert score <= 0.75


def test_word_overlap_hardly_separates_the_labels() -> None:
    pairs = generator.make_pairs(4000, seed=9)
    overlaps = {
        label: sorted(corpus.word_overlap(pair) for pair in pairs if pair["label"] == label)
        for label in (0, 1)
    }
    medians = {label: values[len(values) // 2] for label, values in overlaps.items()}
    assert abs(medians[0] - medians[1]) < 0.1
    assert overlaps[0][-1] > 0.8
    assert overlaps[1][0] < 0.25


def test_writes_the_corpus_once_and_reads_it_back(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    folder = corpus.write_corpus(tmp_path / "corpus")
    files = {name: folder / f"{name}.parquet" for name in corpus.SPLITS}
    assert sorted(folder.iterdir()) == sorted(files.values())
    for name, file in files.items():
        assert pq.read_table(file).to_pylist() == corpus.load_split(name)
    before = {file: file.stat().st_ino for file in files.values()}
    files["test"].write_bytes(b"cut short")
    corpus.write_corpus(folder)
    assert pq.read_table(files["test"]).num_rows == corpus.SPLITS["test"].num_pairs
    assert files["train"].stat().st_ino == before[files["train"]]


def test_corpus_folder_changes_with_the_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = corpus.corpus_folder()
    assert folder.parent == tmp_path / "train_mrpc"
    monkeypatch.setattr(corpus, "VERSION", corpus.VERSION + 1)
    assert corpus.corpus_folder() != folder


def test_model_is_small_and_safetensors_only() -> None:
    files = {file.name: file.stat().st_size for file in corpus.MODEL_DIR.iterdir()}
    assert files["model.safetensors"] < 1_000_000
    assert {name.rpartition(".")[2] for name in files} <= {"json", "safetensors", "txt"}


def test_model_loads_offline_with_a_new_classifier(offline: None) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(corpus.MODEL_DIR)
    assert config.architectures == ["BertModel"]
    model, info = AutoModelForSequenceClassification.from_pretrained(
        corpus.MODEL_DIR, num_labels=2, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    assert model.config.num_labels == 2


def test_tokenizer_knows_every_word_and_fits_every_pair(offline: None) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus.MODEL_DIR)
    pairs = [pair for name in corpus.SPLITS for pair in corpus.load_split(name)]
    encoded = tokenizer([p["sentence1"] for p in pairs], [p["sentence2"] for p in pairs])
    lengths = [len(ids) for ids in encoded["input_ids"]]
    assert not any(tokenizer.unk_token_id in ids for ids in encoded["input_ids"])
    assert max(lengths) <= tokenizer.model_max_length
    assert max(lengths) > 2 * min(lengths)
    assert encoded["token_type_ids"][0][-1] == 1


def test_pretraining_twice_gives_the_same_bytes(tmp_path: Path, one_thread: None) -> None:
    from lib.demo.pretrain import pretrain

    # In another process as well, whose string hashes differ.
    command = [sys.executable, "-m", "lib.demo.pretrain", "--max_steps", "2"]
    command += ["--num_pairs", "500", "--output_dir", str(tmp_path / "one")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    pretrain(tmp_path / "two", num_pairs=500, max_steps=2)
    outputs = [
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    ]
    assert outputs[0] == outputs[1]
    assert set(outputs[0]) == {file.name for file in corpus.MODEL_DIR.iterdir()}
