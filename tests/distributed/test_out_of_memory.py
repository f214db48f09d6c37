"""--per_device_train_batch_size auto: an update that does not fit is done in smaller parts."""

import os
import subprocess
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate.utils import DistributedType, DynamoBackend
from conftest import ROOT, assert_same_run, torchrun
from runs import assert_same_course, error_line, run, run_and_exit, run_until
from small_memory import PLACES, memory_for
from transformers import BertForSequenceClassification

from lib.checkpoints.run_folder import RunFolder
from lib.cli.config import TrainConfig
from lib.cli.rules import resolve
from lib.distributed.out_of_memory import check_repeatable
from lib.errors import InputError

AUTO = "--per_device_train_batch_size=auto"


def found(folder):
    return (folder / "micro_batch_size").read_text()


@pytest.fixture(scope="module")
def on_two(flags, tmp_path_factory):
    """Runs of two processes, on one of which 4 rows stop fitting at the fourth update."""
    folder = tmp_path_factory.mktemp("on_two")
    command = [*torchrun(2), str(Path(__file__).parent / "small_memory.py"), str(folder)]
    done = subprocess.run(
        [*command, *flags, AUTO, "--checkpointing_steps=epoch"],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("place", PLACES)
def test_out_of_memory_on_one_of_two_processes_changes_nothing(on_two, once, place):
    """Losses, gradient norms and weights to 1e-6, as without it on one process."""
    folder, _ = on_two
    assert_same_course(folder / place, once)
    assert found(folder / place) == "2\n"


@pytest.mark.processes
def test_it_is_said_once(on_two):
    line = "out of memory with 4 rows in a micro-batch: the same update again with 2"
    assert on_two[1].count(line) == len(PLACES)


@pytest.fixture(scope="module")
def with_dropout(flags, dropout_bert):
    """Two epochs of 7 updates of 8 rows."""
    return [*flags, f"--model_name_or_path={dropout_bert}", "--num_train_epochs=2"]


@pytest.fixture(scope="module")
def halved(with_dropout, tmp_path_factory):
    """A run in which 8 rows stop fitting at the fourth update."""
    folder = tmp_path_factory.mktemp("halved")
    with memory_for(4, after=3, where="backward") as failed:
        run(with_dropout, folder, AUTO, "--checkpointing_steps=1")
    assert failed == [8]
    return folder


def test_the_rest_of_the_run_is_one_of_the_smaller_size_bit_for_bit(with_dropout, halved, tmp_path):
    steps = "--checkpointing_steps=1"
    run(with_dropout, tmp_path / "whole", steps)
    source = f"--resume_from_checkpoint={tmp_path / 'whole' / 'step_3'}"
    run(with_dropout, tmp_path / "rest", source, "--per_device_train_batch_size=4", steps)
    assert_same_run(halved, tmp_path / "rest", "step_14")


@pytest.mark.parametrize("source", [[], ["step_5"]])
def test_a_resumed_run_does_not_run_out_of_memory_again(
    with_dropout, halved, tmp_path, source, capsys
):
    """Neither in its own folder nor from a checkpoint of another."""
    first = tmp_path / "first"
    with memory_for(4, after=3, where="forward") as failed:
        # One check before the first update, one for each of its first three, then two for each.
        run_until(with_dropout, first, 1 + 3 + 1 + 2 * 3 + 1, AUTO)
    assert failed == [8]
    folder = tmp_path / "second" if source else first
    more = [f"--resume_from_checkpoint={first / 'step_6'}"] if source else []
    with memory_for(4, after=0, where="forward") as failed:
        run(with_dropout, folder, AUTO, "--checkpointing_steps=1", *more)
    assert failed == []
    assert found(folder) == "4\n"
    assert "an earlier start ran out of memory: at most 4 rows" in capsys.readouterr().err
    assert_same_run(halved, folder, "step_14")


def test_nothing_of_an_update_that_failed_is_kept(flags, tmp_path):
    """Its activations would leave less memory to the smaller micro-batches."""
    saved, alive = [], []
    forward = BertForSequenceClassification.forward

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            saved.append(weakref.ref(self))

    def watched(model, **batch):
        if not model.training:
            return forward(model, **batch)
        alive.append(sum(activation() is not None for activation in saved))
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda activation: activation.tensor):
            return forward(model, **batch)

    with (
        mock.patch.object(BertForSequenceClassification, "forward", watched),
        memory_for(4, after=3, where="backward") as failed,
    ):
        run(flags, tmp_path, AUTO)
    assert failed == [8]
    assert set(alive) == {0}


def test_another_run_in_the_folder_searches_anew(with_dropout, tmp_path):
    with memory_for(4, after=3, where="forward"):
        run(with_dropout, tmp_path, AUTO)
    run(with_dropout, tmp_path, AUTO, "--seed=1", "--overwrite_output_dir")
    assert not (tmp_path / "micro_batch_size").exists()


def test_a_row_that_does_not_fit_ends_the_run_with_one_line(flags, tmp_path, capsys):
    with memory_for(0, after=0, where="forward") as failed:
        assert run_and_exit(flags, tmp_path, AUTO) == 2
    # The longest rows come first, 7 of them; one of eight micro-batches holds a filling row.
    assert failed == [7, 4, 3, 2, 2, 2, 1, *[1] * 8]
    assert "with one row in each micro-batch" in error_line(capsys.readouterr().err)
    # The remedies make room for more rows, and the next start looks for how many.
    assert not (tmp_path / "micro_batch_size").exists()


def test_what_fit_elsewhere_is_halved_as_it_is_cut_here(flags, once, tmp_path, monkeypatch):
    """At most 7 rows cut updates of 8 into 4 and 4; half of that is 2, and not 4 of 7."""
    monkeypatch.setattr(RunFolder, "found_micro_batch_size", lambda *_: 7)
    with memory_for(3, after=6, where="forward") as failed:
        run(flags, tmp_path, AUTO)
    assert set(failed) == {4}
    assert found(tmp_path) == "2\n"
    assert_same_course(tmp_path, once)


def test_a_dry_run_that_does_not_fit_ends_with_one_line(flags, tmp_path, capsys):
    with memory_for(4, after=0, where="forward"):
        assert run_and_exit(flags, tmp_path / "out", "--dry_run") == 2
    assert "out of memory with 7 rows in a micro-batch" in error_line(capsys.readouterr().err)


def test_without_auto_the_error_is_raised_as_it_is(flags, tmp_path):
    with (
        memory_for(4, after=0, where="forward"),
        pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"),
    ):
        run(flags, tmp_path)


@pytest.mark.parametrize(
    ("backend", "compiler", "named"),
    [
        ("FSDP", "NO", "with FSDP"),
        ("DEEPSPEED", "NO", "with DEEPSPEED"),
        ("XLA", "NO", "with XLA"),
        ("NO", "INDUCTOR", "with the compiler inductor"),
        ("MULTI_GPU", "NO", None),
    ],
)
def test_refuses_what_cannot_repeat_an_update(backend, compiler, named):
    state = SimpleNamespace(
        distributed_type=DistributedType(backend),
        dynamo_plugin=SimpleNamespace(backend=DynamoBackend(compiler)),
    )
    check_repeatable(8, state)
    if named is None:
        check_repeatable("auto", state)
        return
    with pytest.raises(InputError, match=f"auto does not work {named}.*give a number"):
        check_repeatable("auto", state)


def test_auto_starts_with_an_even_share():
    config = TrainConfig(per_device_train_batch_size="auto", train_batch_size=24)
    resolved, accumulation = resolve(config, 2, {})
    assert (resolved.train_batch_size, accumulation) == (24, 1)
    assert resolved.per_device_train_batch_size == "auto"


def test_refuses_an_accumulation_beside_auto():
    with pytest.raises(InputError, match="auto decides --gradient_accumulation_steps too, got 2"):
        TrainConfig(per_device_train_batch_size="auto", gradient_accumulation_steps=2)
