"""Whole runs in this process, against a plain PyTorch loop and against each other."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import NUM_TRAIN, pairs, read_metrics, read_weights, write_csv
from huggingface_hub import ModelCard
from runs import assert_same_course, difference, run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from lib.cli.parsing import parse_arguments
from lib.data.batching import plan_epoch
from lib.data.splits import load_splits
from lib.errors import InputError, NonFiniteError


def test_equals_a_plain_loop_over_whole_batches(files, bert, once):
    """By Hugging Face's own loss, the schedule by hand, and no Accelerate."""
    tokenizer = AutoTokenizer.from_pretrained(bert)
    rows = load_splits(
        {"train": str(files["train"]), "validation": str(files["validation"])}, task_name=None
    ).train
    encoded = tokenizer(rows["sentence1"][:], rows["sentence2"][:], truncation=True, max_length=64)
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    torch.manual_seed(42)
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        eps=1e-5,
        foreach=False,
    )
    batches = plan_epoch(lengths, seed=42, epoch=0, batch_size=8, num_micro_batches=1)
    losses, norms, rates = [], [], []
    for update, (batch,) in enumerate(batches):
        # One update of 7 warms up (10%, rounded up); the other six come down to 0.
        rate = 1e-3 * (update if update < 1 else (7 - update) / 6)
        for group in optimizer.param_groups:
            group["lr"] = rate
        labels = torch.tensor(rows[batch]["labels"])
        columns = {name: [values[row] for row in batch] for name, values in encoded.items()}
        inputs = tokenizer.pad(columns, return_tensors="pt")
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        rates.append(rate)
    logged = [line for line in read_metrics(once) if "loss" in line]
    assert [line["loss"] for line in logged] == pytest.approx(losses, abs=1e-6)
    # Clipping and Adam hide a gradient of the wrong scale; its norm does not.
    assert [line["grad_norm"] for line in logged] == pytest.approx(norms, rel=1e-5)
    assert [line["learning_rate"] for line in logged] == pytest.approx(rates, abs=1e-12)
    assert difference(read_weights(once / "epoch_0"), model.state_dict()) < 1e-6


@pytest.mark.parametrize("accumulation", [2, 3, 4, 8])
def test_cutting_an_update_into_micro_batches_changes_nothing(flags, once, tmp_path, accumulation):
    """Also unevenly, and so finely that some are empty (8 micro-batches of 7 rows)."""
    cut = f"--gradient_accumulation_steps={accumulation}"
    run(flags, tmp_path, cut, "--checkpointing_steps=epoch")
    assert_same_course(tmp_path, once)


def test_batch_flags_of_run_glue_no_trainer_give_the_same_run(flags, once, tmp_path):
    without = [flag for flag in flags if "train_batch_size" not in flag]
    theirs = ["--per_device_train_batch_size=4", "--gradient_accumulation_steps=2"]
    run(without, tmp_path, *theirs, "--checkpointing_steps=epoch")
    assert_same_course(tmp_path, once)


def test_dropout_is_on_from_the_first_update(flags, once, dropout_bert, tmp_path):
    """`from_pretrained` returns a model in evaluation mode; these two differ in dropout alone."""
    run(flags, tmp_path, f"--model_name_or_path={dropout_bert}", "--max_train_steps=1")
    first, without = read_metrics(tmp_path)[0], read_metrics(once)[0]
    assert abs(first["loss"] - without["loss"]) > 1e-4


def test_the_same_seed_gives_the_same_bits_and_another_does_not(flags, dropout_bert, tmp_path):
    dropout = f"--model_name_or_path={dropout_bert}"
    for name, seed in (("a", 42), ("b", 42), ("c", 43)):
        run(flags, tmp_path / name, dropout, f"--seed={seed}")
    one, same, other = (read_weights(tmp_path / name) for name in "abc")
    assert difference(one, same) == 0
    assert difference(one, other) > 0


def test_stops_after_max_train_steps(flags, tmp_path):
    results = run(flags, tmp_path, "--max_train_steps=9", "--checkpointing_steps=epoch")
    assert results["num_updates"] == 9
    assert (tmp_path / "epoch_0").is_dir()
    assert (tmp_path / "epoch_1").is_dir()


def test_evaluates_every_n_updates_and_at_the_end(flags, tmp_path):
    run(flags, tmp_path, "--eval_every=3")
    assert [line["update"] for line in read_metrics(tmp_path) if "eval_loss" in line] == [3, 6, 7]


def test_keeps_the_best_model_and_stops_early(flags, tmp_path):
    # A learning rate that only does harm: the first evaluation stays the best.
    results = run(
        flags, tmp_path, "--learning_rate=0.5", "--num_train_epochs=20", "--lr_scheduler_type",
        "constant", "--early_stopping_patience=2", "--metric_for_best_model=loss",
    )  # fmt: skip
    lines = [line for line in read_metrics(tmp_path) if "eval_loss" in line]
    losses = [line["eval_loss"] for line in lines]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 20
    assert results["best_update"] == lines[best]["update"]
    assert results["eval_loss"] == pytest.approx(min(losses), abs=1e-6)


def test_reports_a_collapsed_classifier(flags, tmp_path, capsys):
    results = run(flags, tmp_path, "--learning_rate=0", "--max_train_steps=1")
    answers = {
        json.loads(line)["prediction"]
        for line in (tmp_path / "predictions" / "validation.jsonl").read_text().splitlines()
    }
    assert (len(answers) == 1) == ("eval_collapsed_to" in results)
    results = run(flags, tmp_path / "b", "--learning_rate=1", "--max_grad_norm=0")
    assert results["eval_collapsed_to"] in ("0", "1")
    assert "every row is predicted as" in capsys.readouterr().out


def with_bias(bert, folder, value):
    """A copy of a model in which one bias is `value`."""
    for file in bert.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(bert / "model.safetensors")
    weights["encoder.layer.0.output.dense.bias"][0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_names_weights_that_are_not_finite_instead_of_rows(flags, bert, tmp_path):
    with_bias(bert, tmp_path, math.nan)
    with pytest.raises(InputError, match=r"0\.output\.dense\.bias holds values that are not"):
        run(flags, tmp_path / "out", f"--model_name_or_path={tmp_path}")
    assert not (tmp_path / "out").exists()


def test_stops_at_a_gradient_that_is_not_finite(flags, bert, tmp_path):
    with_bias(bert, tmp_path, 3e38)  # which overflows in the forward pass
    with pytest.raises(
        NonFiniteError, match="update 1 is not finite.*learning rate was 0.*rows"
    ) as error:
        run(flags, tmp_path / "out", f"--model_name_or_path={tmp_path}")
    rows = json.loads(str(error.value).split("from 0) ")[1].split(":")[0])
    assert len(set(rows)) in (7, 8)
    assert set(rows) < set(range(NUM_TRAIN))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status["status"] == "failed"
    assert "update 1 is not finite" in status["reason"]


@pytest.mark.parametrize("fused", [True, False])
def test_an_update_that_is_not_finite_leaves_no_trace(fused):
    """A fused optimizer skips it on the device, and the step of another is undone there."""
    from accelerate import Accelerator

    from lib.training.meter import Meter

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    model = torch.nn.Linear(1, 1)  # of which the FLOPs are not known
    meter = Meter(Accelerator(), model, optimizer, lambda update: f"look at {update}", 0.0)
    for update, slope in enumerate((1.0, math.inf, 1.0), start=1):
        weight.grad = torch.full((3,), slope)
        meter.start_update()
        meter.add_loss(torch.tensor(2.0))
        meter.guard_update(update, 1, weight.grad.norm())
        meter.count_update(1, 3, 4, 9)
        optimizer.step()
        if update == 1:
            after_one = weight.detach().clone()
            moments = {name: value.clone() for name, value in optimizer.state[weight].items()}
            assert not torch.equal(after_one, torch.ones(3))
            figures = meter.read()
            assert figures["loss"] == 2.0
            assert figures["grad_norm"] == pytest.approx(math.sqrt(3))
            assert figures["padding"] == 0.25
            assert figures["learning_rate"] == 0.1
    assert torch.equal(weight, after_one)
    assert all(torch.equal(optimizer.state[weight][name], moments[name]) for name in moments)
    with pytest.raises(NonFiniteError, match="update 2 is not finite.*look at 2"):
        meter.check()


def test_prints_a_line_for_each_logged_update_without_a_terminal(flags, tmp_path, capsys):
    run(flags, tmp_path, "--logging_steps=3")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("update")]
    # The loss at once, so that a wrong learning rate shows before the first logged update.
    assert lines[0].startswith("update 1/7: loss ")
    assert [line.split(",")[0] for line in lines[1:]] == ["update 3/7", "update 6/7", "update 7/7"]
    assert all(word in lines[1] for word in ("loss", "examples/s", "tokens/s", "s left"))


def test_scores_both_validation_splits_of_mnli(bert, tmp_path):
    import datasets

    rows = {"premise": ["a b"] * 6, "hypothesis": ["c"] * 6, "label": [0, 1, 2] * 2}
    for split in ("train", "validation_matched", "validation_mismatched", "test_matched"):
        labels = [-1] * 6 if split.startswith("test") else rows["label"]
        table = datasets.Dataset.from_dict({**rows, "label": labels})
        table.to_parquet(str(tmp_path / f"{split}.parquet"))
    flags = ["--task_name=mnli", f"--dataset_name={tmp_path}", f"--model_name_or_path={bert}"]
    results = run(flags, tmp_path / "out", "--max_train_steps=1", "--max_length=32", report=True)
    assert results["eval_num_rows"] == results["eval_mm_num_rows"] == 6
    card = ModelCard.load(tmp_path / "out" / "README.md")
    names = ("accuracy", "macro_f1", "balanced_accuracy", "roc_auc")
    assert [(r.dataset_split, r.metric_type) for r in card.data.eval_results] == [
        (f"validation_{part}matched", name) for part in ("", "mis") for name in names
    ]
    lines = (tmp_path / "out" / "predictions" / "MNLI-m.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert lines[1].split("\t")[1] in ("entailment", "neutral", "contradiction")


def test_what_a_run_leaves(flags, files, tmp_path):
    results = run(flags, tmp_path, f"--test_file={files['test']}", report=True)
    assert (tmp_path / "report" / "index.html").exists()
    assert (tmp_path / "README.md").exists()
    assert json.loads((tmp_path / "all_results.json").read_text()) == results
    for name in ("accuracy", "f1", "combined_score"):
        low, high = results[f"eval_{name}_ci95"]
        assert low <= results[f"eval_{name}"] <= high
    assert results["eval_num_rows"] == 23
    assert results["test_num_rows"] == 9  # these test rows are labelled, so they are scored
    assert 0 <= results["test_accuracy"] <= 1
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    # Some wheels name their build, +cu130, in one of the two only.
    assert manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert len(manifest["data_fingerprint"]) == 64
    again = parse_arguments(["--config", str(tmp_path / "config.yaml")])
    assert again.learning_rate == 1e-3
    assert again.train_batch_size == 8


def test_the_saved_model_reproduces_the_written_predictions(flags, tmp_path):
    run(flags, tmp_path)
    classify = pipeline("text-classification", str(tmp_path), top_k=None)
    rows = pairs(23, 12)
    answers = classify([{"text": r["sentence1"], "text_pair": r["sentence2"]} for r in rows])
    lines = (tmp_path / "predictions" / "validation.jsonl").read_text().splitlines()
    for answer, line in zip(answers, map(json.loads, lines), strict=True):
        scores = {choice["label"]: choice["score"] for choice in answer}
        assert scores == pytest.approx(line["probabilities"], abs=1e-5)
        assert max(scores, key=scores.get) == line["prediction"]


def test_decimal_labels_are_a_regression(flags, tmp_path):
    rows = [{**row, "label": row["label"] * 2.5 + 0.5} for row in pairs(40, 3)]
    path = write_csv(tmp_path / "scores.csv", rows)
    files = [f"--train_file={path}", f"--validation_file={path}"]
    results = run(flags, tmp_path / "out", *files, "--gradient_accumulation_steps=3")
    assert -1 <= results["eval_pearson"] <= 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "regression"


def test_single_sentences_with_named_labels(flags, tmp_path):
    rows = [{"text": r["sentence1"], "label": ("bad", "good")[r["label"]]} for r in pairs(30, 4)]
    path = write_csv(tmp_path / "texts.csv", rows)
    run(flags, tmp_path / "out", f"--train_file={path}", f"--validation_file={path}")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}


def test_dry_run_describes_the_run_and_writes_nothing(flags, tmp_path, capsys):
    run(flags, tmp_path / "out", "--dry_run")
    lines = capsys.readouterr().out.splitlines()
    assert all(line[22] == " " != line[23] for line in lines)  # the values are aligned
    printed = {line[:23].strip(): line[23:] for line in lines}
    assert printed["train"] == f"{NUM_TRAIN} rows"
    assert printed["updates"] == "7 per epoch, 7 in total"
    assert printed["global batch"] == "7 to 8 rows"
    assert printed["micro-batch"] == "at most 8 rows"
    assert printed["processes"] == printed["gradient accumulation"] == "1"
    assert "gradient norm" in printed["one backward pass"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "micro_batch"),
    [
        ("--gradient_accumulation_steps=2", "about 4 rows, of equally many tokens"),
        ("--per_device_train_batch_size=4", "at most 4 rows"),
    ],
)
def test_rows_are_dealt_by_tokens_unless_their_number_is_given(
    flags, tmp_path, capsys, flag, micro_batch
):
    run(flags, tmp_path / "out", "--dry_run", flag)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "micro-batch" in line)
    assert line[23:] == micro_batch


def test_keeps_another_run_in_the_folder(flags, tmp_path):
    run(flags, tmp_path, "--max_train_steps=1")
    (tmp_path / "mine.txt").write_text("mine")
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(InputError, match="seed 42 there, 1 here.*--overwrite_output_dir"):
        run(flags, tmp_path, "--seed=1", "--max_train_steps=1")
    assert (tmp_path / "config.yaml").read_text() == before
    run(flags, tmp_path, "--seed=1", "--max_train_steps=1", "--overwrite_output_dir")
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["README.md", "config.yaml"])
def test_keeps_files_of_the_user(flags, tmp_path, name):
    (tmp_path / name).write_text("lr: 1")
    for more in ((), ("--overwrite_output_dir",)):
        with pytest.raises(InputError, match=f"files that are not of a run .{name}."):
            run(flags, tmp_path, *more)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model_name_or_path=a/b"], "a/b is neither a folder, nor cached.*--prefetch"),
        (["--metric_for_best_model=bleu"], "must be one of accuracy, f1, .*loss"),
        (["--max_length=4096"], "4096 is more than the 96 tokens"),
        (["--reinit_layers=9"], "9 is more than the model's 2 encoder layers"),
        (["--resume_from_checkpoint=nowhere"], "nowhere is not a checkpoint of this script"),
        (["--output_dir=/proc/out"], "/proc/out"),
        (["--output_dir="], "--output_dir is empty"),
        (["--report_to", "none", "wandb"], "none stands alone"),
    ],
)
def test_rejects_bad_input_before_writing_anything(flags, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        run(flags, tmp_path / "out", *more)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_precision_is_accelerates(flags, once, tmp_path, accelerate_options):
    accelerate_options.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run(flags, tmp_path, "--checkpointing_steps=epoch")
    assert json.loads((tmp_path / "manifest.json").read_text())["precision"] == "bf16"
    weights, plain = read_weights(tmp_path / "epoch_0"), read_weights(once / "epoch_0")
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert 0 < difference(weights, plain) < 0.05


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has fp16")
def test_fp16_without_a_gpu_is_fp32_with_a_warning(flags, tmp_path, accelerate_options, capfd):
    accelerate_options.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    run(flags, tmp_path, "--max_train_steps=1")
    assert capfd.readouterr().err.count("CPUs have no fp16: training in fp32") == 1
    assert json.loads((tmp_path / "manifest.json").read_text())["precision"] == "no"


def test_compiled_runs_take_the_same_course(flags, once, tmp_path, accelerate_options):
    """Through Accelerate's dynamo options; rows are filled up to few shapes."""
    accelerate_options.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    run(flags, tmp_path, "--checkpointing_steps=epoch")
    assert_same_course(tmp_path, once)
    pipeline("text-classification", str(tmp_path))("it loads")
