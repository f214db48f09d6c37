"""TPUs, as far as torch_xla runs on a CPU: one process. `make test-xla` runs these tests."""

import contextlib
import csv
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from conftest import (
    ROOT,
    SCRIPT,
    assert_same_run,
    last_update,
    read_metrics,
    read_weights,
    run_script,
    wait_for,
)
from runs import difference, error_line, run
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForSequenceClassification, pipeline

from lib.checkpoints.checkpoint import Checkpoints
from lib.distributed.process_group import process_group
from lib.errors import NonFiniteError
from lib.training import optimization
from lib.training.meter import Meter

if importlib.util.find_spec("torch_xla") is None:
    pytest.skip("needs torch_xla: make test-xla", allow_module_level=True)

from torch_xla.debug import metrics

pytestmark = pytest.mark.processes

CONFIGURATION = ROOT / "accelerate_configs" / "tpu.yaml"

# Of weights after two epochs: the compiler orders the sums of fp32 in its own way.
TOLERANCE = 2e-6


def launch(log, *arguments, **variables):
    """Start the launcher with the shipped file, in its own process group."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    with log.open("a") as file:
        return subprocess.Popen(
            [*launcher, f"--config_file={CONFIGURATION}", str(SCRIPT), *arguments],
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run_to_the_end(log, *arguments, **variables):
    """Return the exit status of the launcher."""
    process = launch(log, *arguments, **variables)
    try:
        return process.wait(timeout=400)
    finally:
        kill(process)


def kill(process):
    """Kill the launcher and the process that trains."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


@pytest.fixture(scope="module")
def short(flags):
    """Two epochs of 7 updates without dropout, in few shapes, as each costs a compilation."""
    return [*flags, "--max_length=32", "--num_train_epochs=2", "--logging_steps=5"]


@pytest.fixture(scope="module")
def long(short, dropout_bert):
    """Six epochs of 7 updates of two micro-batches, with dropout."""
    return [
        *short,
        f"--model_name_or_path={dropout_bert}",
        "--num_train_epochs=6",
        "--eval_every=10",
        "--checkpointing_steps=10",
        "--gradient_accumulation_steps=2",
        "--pad_to_max_length",
    ]


@pytest.fixture(scope="module")
def whole(long, tmp_path_factory):
    """The output folder of an uninterrupted run, launched as shipped."""
    folder = tmp_path_factory.mktemp("whole")
    log = folder.with_suffix(".log")
    assert run_to_the_end(log, *long, f"--output_dir={folder}") == 0, log.read_text()
    return folder


def test_trains_as_shipped(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["device"] == "1 x XLA"
    assert manifest["precision"] == "no"
    printed = whole.with_suffix(".log").read_text()
    assert printed.count(" -> ") == 2  # the header of the launcher, and that of the run


def test_evaluates_every_row_once_and_exports_what_it_evaluated(whole, files):
    lines = [
        json.loads(line)
        for line in (whole / "predictions" / "validation.jsonl").read_text().splitlines()
    ]
    with files["validation"].open() as file:
        rows = list(csv.DictReader(file))
    assert [line["index"] for line in lines] == list(range(len(rows)))
    correct = [line["prediction"] == line["label"] for line in lines]
    results = json.loads((whole / "all_results.json").read_text())
    assert results["eval_accuracy"] == sum(correct) / len(rows)
    classify = pipeline("text-classification", str(whole), device="cpu")
    pairs = [{"text": row["sentence1"], "text_pair": row["sentence2"]} for row in rows]
    scored = classify(pairs, truncation=True, max_length=32)
    for found, line in zip(scored, lines, strict=True):
        assert found["label"] == line["prediction"]
        assert found["score"] == pytest.approx(max(line["probabilities"].values()), abs=1e-5)


def test_stopped_by_sigterm_and_sigkill_it_ends_with_the_same_bits(long, whole, tmp_path):
    """The signal reaches the launcher alone, as that of a cluster may."""
    folder, log = tmp_path / "out", tmp_path / "log"
    arguments = [*long, f"--output_dir={folder}"]
    process = launch(log, *arguments)
    try:
        wait_for(lambda: last_update(folder) >= 10, seconds=300)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 75, log.read_text()
    finally:
        kill(process)
    printed = log.read_text()
    assert printed.count("SIGTERM received: saving, please wait") == 1
    assert printed.count("train_mrpc.py: stopped by SIGTERM after update") == 1
    assert "Traceback" not in printed
    assert json.loads((folder / "status.json").read_text())["status"] == "preempted"
    process = launch(log, *arguments)
    try:
        wait_for(lambda: last_update(folder) >= 25, seconds=300)
    finally:
        kill(process)
    assert run_to_the_end(log, *arguments) == 0, log.read_text()
    assert log.read_text().count("resuming from") == 2
    assert_same_run(folder, whole, "step_40")


def counted():
    """Compilations, and numbers or tensors read from the device, so far."""
    compilations, transfers = (
        (metrics.metric_data(name) or (0,))[0] for name in ("CompileTime", "TransferFromDeviceTime")
    )
    return compilations, transfers


def test_stopped_before_it_trains_it_ends_with_one_line_and_75(short, tmp_path):
    """The process that is to train still imports the launcher, and would die of the signal."""
    log = tmp_path / "log"
    process = launch(log, *short, f"--output_dir={tmp_path / 'out'}")
    started = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        wait_for(lambda: "spawn_main" in commands(started.read_text().split()))
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75, log.read_text()
    finally:
        kill(process)
    assert log.read_text().count("stopped by SIGTERM before the first update") == 1
    assert "Traceback" not in log.read_text()


def commands(processes):
    """The command lines of those processes that are alive, in one string."""
    found = ""
    for process in processes:
        with contextlib.suppress(OSError):
            found += Path(f"/proc/{process}/cmdline").read_text()
    return found


@pytest.fixture(scope="module")
def epochs(short, tmp_path_factory):
    """A run of two epochs in this process: its folder, and `counted` after each update."""
    folder = tmp_path_factory.mktemp("epochs")
    counts = []
    count_update = Meter.count_update

    def count(meter, *arguments):
        count_update(meter, *arguments)
        counts.append(counted())

    with mock.patch.object(Meter, "count_update", count):
        run(short, folder, "--checkpointing_steps=epoch")
    return folder, counts


def test_compiles_nothing_after_the_first_epoch(epochs):
    compilations = [count[0] for count in epochs[1]]
    assert compilations[0] > 0
    # After the first evaluation and checkpoint, which come before update 8.
    assert set(compilations[7:]) == {compilations[7]}
    assert compilations[7] <= 20


def test_reads_nothing_from_the_device_between_two_logged_updates(epochs):
    """A line after updates 1, 5 and 10; an evaluation and a checkpoint after 7."""
    transfers = [count[1] for count in epochs[1]]
    for first, last in ((2, 5), (6, 7), (8, 10), (11, 14)):
        assert len(set(transfers[first - 1 : last])) == 1, (first, last, transfers)
    assert transfers[0] < transfers[1] < transfers[5] < transfers[7] < transfers[10]


def test_a_checkpoint_moves_between_xla_and_cpu(short, epochs, tmp_path):
    """The reference is plain PyTorch on one process, with its fused AdamW."""
    plain = {"USE_TORCH_XLA": "0"}
    arguments = [*short, "--checkpointing_steps=epoch"]
    done = run_script([*arguments, f"--output_dir={tmp_path / 'cpu'}"], environment=plain)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "cpu" / "manifest.json").read_text())["device"].startswith(
        "1 x C"
    )
    xla = epochs[0]
    for name in ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy"):
        values, expected = (
            [line[name] for line in read_metrics(folder) if name in line]
            for folder in (xla, tmp_path / "cpu")
        )
        assert values == pytest.approx(expected, abs=1e-6, rel=1e-6)
    for name in ("epoch_0", "epoch_1"):
        weights = [read_weights(folder / name) for folder in (xla, tmp_path / "cpu")]
        assert difference(*weights) < TOLERANCE

    moved = f"--output_dir={tmp_path / 'to cpu'}"
    source = f"--resume_from_checkpoint={xla / 'epoch_0'}"
    done = run_script([*arguments, moved, source], environment=plain)
    assert done.returncode == 0, done.stderr
    source = f"--resume_from_checkpoint={tmp_path / 'cpu' / 'epoch_0'}"
    run(arguments, tmp_path / "to xla", source)
    expected = read_weights(tmp_path / "cpu" / "epoch_1")
    for name in ("to cpu", "to xla"):
        assert difference(read_weights(tmp_path / name / "epoch_1"), expected) < TOLERANCE


def test_an_update_that_is_not_finite_is_not_applied(short, tmp_path):
    """The loss of update 5 is NaN; the next look at it is before the evaluation after update 7."""
    made = []

    class Kept(Checkpoints):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    factors = iter([1.0] * 4 + [math.nan] + [1.0] * 2)
    loss_sum = optimization.loss_sum
    with (
        mock.patch("train_mrpc.Checkpoints", Kept),
        mock.patch.object(optimization, "loss_sum", lambda *args: loss_sum(*args) * next(factors)),
        pytest.raises(NonFiniteError, match="update 5 is not finite; the update was not applied"),
    ):
        run(short, tmp_path, "--logging_steps=50", "--checkpointing_steps=4")
    for file, tensors in made[0]._tensors().items():
        before = load_file(tmp_path / "step_4" / file)
        for name in before.keys() - {
            f"{weight}.step" for weight in read_weights(tmp_path / "step_4")
        }:
            assert torch.equal(tensors[name], before[name]), name


def test_weights_that_are_shared_stay_so_on_the_device():
    """Else the encoder of T5 would train with embeddings of its own, which no optimizer knows."""
    with process_group(60.0):
        config = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        model = T5ForSequenceClassification(config)
        optimizer = torch.optim.AdamW(model.parameters())
        model, optimizer = Accelerator().prepare(model, optimizer)
    shared = model.transformer.shared.weight
    assert shared.device.type == "xla"
    assert model.transformer.encoder.embed_tokens.weight is shared
    assert model.transformer.decoder.embed_tokens.weight is shared
    assert any(weight is shared for weight in optimizer.param_groups[0]["params"])


def test_a_loss_that_overflows_ends_with_one_message(short, bert, tmp_path):
    """As launched; nothing is exported."""
    shutil.copytree(bert, tmp_path / "bert")
    weights = load_file(bert / "model.safetensors")
    weights["encoder.layer.0.output.dense.bias"][0] = 3e38
    save_file(weights, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    log, folder = tmp_path / "log", tmp_path / "out"
    more = [f"--model_name_or_path={tmp_path / 'bert'}", f"--output_dir={folder}"]
    assert run_to_the_end(log, *short, *more) == 1
    assert "update 1 is not finite" in error_line(log.read_text())
    assert not (folder / "model.safetensors").exists()
    assert json.loads((folder / "status.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("variables", "more", "message"),
    [
        ({}, ["--learning_rat=1"], "did you mean --learning_rate"),
        ({"XLA_USE_BF16": "1"}, [], "XLA_USE_BF16 is 1: on TPUs weights and moments would be bf16"),
    ],
)
def test_refuses_in_one_line(short, tmp_path, variables, more, message):
    log, folder = tmp_path / "log", tmp_path / "out"
    assert run_to_the_end(log, *short, f"--output_dir={folder}", *more, **variables) == 2
    assert message in error_line(log.read_text())
    assert not folder.exists()
