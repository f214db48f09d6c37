"""The study of docs/recipe.md at toy size, and the changes that it tries."""

import json
import subprocess
import sys
import tarfile
from functools import partial

import numpy as np
import pandas
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, pairs
from models import load
from torch import nn

from benchmarks import recipe, recipe_report
from benchmarks.recipe_evaluations import FILE
from benchmarks.recipe_variants import (
    R_DROP_ALPHA,
    layerwise_decay,
    mean_pooling,
    r_drop,
    swap_pairs,
)
from lib.cli.config import TrainConfig
from lib.compare.runs import read_run
from lib.data import batching
from lib.data.splits import Splits, load_splits
from lib.training.metrics import compute
from lib.training.optimization import Criterion
from train_mrpc import make_optimizer


@pytest.fixture(scope="module")
def mrpc(tmp_path_factory):
    """A folder like that of GLUE's MRPC, with few rows."""
    folder = tmp_path_factory.mktemp("mrpc")
    for seed, (name, number) in enumerate({"train": 40, "validation": 24, "test": 6}.items()):
        rows = pandas.DataFrame(pairs(number, seed=300 + seed))
        rows["idx"] = range(number)
        rows.to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.mark.processes
def test_study_trains_keeps_a_record_and_reports(mrpc, dropout_bert, tmp_path, capsys):
    runs, record = tmp_path / "runs", tmp_path / "record"
    command = [sys.executable, "-m", "benchmarks.recipe", "--jobs", "2", "--seeds", "1"]
    command += ["--dataset_name", mrpc, "--model_name_or_path", dropout_bert]
    command += ["--output_dir", runs, "--record", record, "--recipes", "default", "r_drop"]
    command += ["--max_length", "96"]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
    evaluations = {}
    for name in ("default.s1", "r_drop.s1"):
        run = read_run(runs / name)
        assert not list((runs / name).rglob("*.safetensors"))
        evaluations[name] = np.load(runs / name / FILE)
        assert evaluations[name]["logits"].shape == (5, 24, 2)
        # Its best evaluation is the one that the run kept.
        scores = [
            compute(["accuracy", "f1"], logits.argmax(-1), run.labels)["combined_score"]
            for logits in evaluations[name]["logits"]
        ]
        assert max(scores) == pytest.approx(run.figures["eval_combined_score"])
    assert (evaluations["default.s1"]["logits"] != evaluations["r_drop.s1"]["logits"]).any()
    assert (runs / "default.s1" / "predictions" / "MRPC.tsv").read_text().count("\n") == 7

    # The record is as good as the runs: from it, nothing is trained again.
    again = tmp_path / "again"
    for archive in record.iterdir():
        with tarfile.open(archive) as packed:
            packed.extractall(again, filter="data")
    for file in ("config.yaml", "manifest.json"):
        content = (again / "r_drop.s1" / file).read_text()
        assert mrpc.name in content
        assert str(mrpc.parent) not in content
        assert str(tmp_path) not in content
    command[command.index(runs)] = again
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
    assert not (again / "logs").exists()
    before = {path.name: path.read_bytes() for path in record.iterdir()}
    recipe.pack(again, "default", tmp_path / "twice")
    assert (tmp_path / "twice" / "default.tar.xz").read_bytes() == before["default.tar.xz"]

    recipe_report.write_predictions_not_kept(again)
    rows = list(recipe_report.table(again))
    assert [row.split("|")[1].strip() for row in rows] == ["recipe", "---", "default", "r_drop"]
    command += ["--max_length", "96"]
    for derived in ("both_orders.s1", "last/averaged.s1", "last/r_drop.s1"):
        read_run(again / derived)


def test_only_what_gains_in_five_seeds_is_trained_with_twenty(tmp_path):
    for name in (recipe.DEFAULT, *recipe.CANDIDATES):
        for seed in recipe.SCREENING_SEEDS:
            folder = recipe.folder_of(tmp_path, name, seed)
            folder.mkdir()
            # An earlier evaluation does not count.
            score = {"r_drop": 0.846, "swap_pairs": 0.844}.get(name, 0.84) + (seed - 3) / 100
            lines = [{"eval_combined_score": value} for value in (0.9, score)]
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    both, screening, survivors = map(list, recipe.stages(tmp_path))
    assert both == [(name, seed) for seed in range(1, 21) for name in ("plain", "default")]
    assert len(screening) == 8 * 5
    assert survivors == [("r_drop", seed) for seed in range(1, 21)]


def test_choice_of_the_best_evaluation_by_hand():
    labels = np.array([1, 1, 0, 0])
    right, wrong = np.eye(2)[labels], np.eye(2)[1 - labels]
    found = recipe_report.choices(np.stack([right, wrong]), labels)
    # Whatever half chooses takes the first, which is right in the other half as well.
    assert (found["best"], found["last"]) == (1, 0)
    alike = recipe_report.choices(np.stack([wrong, wrong]), labels)
    assert alike == {"best": 0, "last": 0, "cross_fitted": 0}
    # Right in two rows each: any choice is right on one half and wrong on the other, or as good.
    one = np.where((np.arange(4) % 2 == 0)[:, None], right, wrong)
    other = np.where((np.arange(4) % 2 == 1)[:, None], right, wrong)
    chance = recipe_report.choices(np.stack([one, other]), labels)
    assert chance["cross_fitted"] < chance["best"]


def test_layers_learn_slower_towards_the_bottom(dropout_bert):
    model = load(dropout_bert)  # two layers
    with layerwise_decay():
        config, accelerator = TrainConfig(demo=True, learning_rate=1.0), Accelerator()
        optimizer, _ = make_optimizer(config, model, 10, accelerator)
    groups = optimizer.param_groups
    rates = {weight: group["initial_lr"] for group in groups for weight in group["params"]}
    expected = {
        "classifier": 1,
        "pooler": 1,
        "layer.1.": 0.9,
        "layer.0.": 0.9**2,
        "embeddings": 0.9**3,
    }
    for name, weight in model.named_parameters():
        rate = next(rate for part, rate in expected.items() if part in name)
        assert rates[weight] == pytest.approx(rate), name


def test_swapped_pairs_are_half_of_the_rows_and_others_in_each_epoch(mrpc):
    splits = load_splits(str(mrpc), task_name="mrpc")

    def encode(batch, rows, *, columns):
        texts = zip(*(batch[name] for name in columns), strict=True)
        return {"text": [" | ".join(pair) for pair in texts], "row": rows}

    options = {"batched": True, "with_indices": True, "remove_columns": list(splits.task.columns)}
    columns = list(splits.task.columns)
    with swap_pairs():
        tokenized = splits.map(partial(encode, columns=columns), cache_key="swap", **options)
        plan = partial(batching.plan_epoch, np.full(80, 9), batch_size=8, num_micro_batches=1)
        plans = [plan(epoch, seed=1) for epoch in (0, 0, 1)]
    assert isinstance(tokenized, Splits)
    first, second = splits.train["sentence1"][3], splits.train["sentence2"][3]
    assert tokenized.train["text"][3] == f"{first} | {second}"
    assert tokenized.train["text"][43] == f"{second} | {first}"
    assert len(tokenized.validation["validation"]) == 24
    order, same, other = (plan.order for plan in plans)
    assert sorted(order % 40) == list(range(40))
    assert 8 <= (order >= 40).sum() <= 32
    assert (order == same).all()
    assert {*order[order >= 40]} != {*other[other >= 40]}


def test_r_drop_adds_the_symmetric_divergence(mrpc):
    criterion = Criterion(load_splits(str(mrpc), task_name="mrpc"), ("none",), 0.0)
    first = torch.tensor([[2.0, -1.0], [0.5, 0.0]])
    second = torch.tensor([[1.0, 0.0], [-0.5, 1.0]])
    labels = torch.tensor([0, 1])
    plain = criterion.sum(first, labels)
    with r_drop():
        assert criterion.sum(torch.cat([first, first]), labels) == pytest.approx(float(plain))
        found = criterion.sum(torch.cat([first, second]), labels)
    p, q = first.softmax(-1), second.softmax(-1)
    divergence = ((p - q) * (p.log() - q.log())).sum() / 2  # KL(p, q) + KL(q, p), halved
    losses = [
        nn.functional.cross_entropy(each, labels, reduction="sum") for each in (first, second)
    ]
    assert found == pytest.approx(float(sum(losses) / 2 + R_DROP_ALPHA * divergence))


def test_mean_pooling_reads_all_tokens_but_padding(dropout_bert):
    ids, mask = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]]), torch.tensor([[1, 1, 1, 0], [1] * 4])
    with torch.no_grad(), mean_pooling():
        model = load(dropout_bert).eval()  # as the script does, with all tokens of the last layer
        hidden = model.bert(ids, attention_mask=mask).last_hidden_state
        assert hidden.shape[:2] == ids.shape
        found = model(input_ids=ids, attention_mask=mask).logits
        means = torch.stack([hidden[0, :3].mean(0), hidden[1].mean(0)])
        pooled = model.bert.pooler.activation(model.bert.pooler.dense(means))
        assert torch.allclose(found, model.classifier(pooled))
