"""The command lines that users bring from transformers' run_glue_no_trainer.py."""

import json

import pytest
from conftest import pairs, write_csv
from runs import run

from lib.demo.corpus import MODEL_DIR


def test_the_test_command_of_run_glue_no_trainer(tmp_path, capsys):
    """Their flags and their assertions, with a small model and other pairs."""
    train = write_csv(tmp_path / "train.csv", pairs(800, 31))
    dev = write_csv(tmp_path / "dev.csv", pairs(60, 32))
    output = tmp_path / "out"
    command = f"""
        --model_name_or_path {MODEL_DIR}
        --train_file {train}
        --validation_file {dev}
        --per_device_train_batch_size=2
        --per_device_eval_batch_size=1
        --learning_rate=1e-4
        --seed=42
        --num_warmup_steps=2
        --checkpointing_steps epoch
        --with_tracking
    """
    run([*command.split(), "--max_length=96"], output)
    results = json.loads((output / "all_results.json").read_text())
    assert results["eval_accuracy"] >= 0.75
    assert (output / "epoch_0").is_dir()
    assert "epoch 0: {'accuracy': " in capsys.readouterr().out
    assert list(output.glob("wandb/offline-run-*")), "wandb has no run"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_global_batch_is_their_product(flags, tmp_path, accumulation):
    without = [flag for flag in flags if "train_batch_size" not in flag]
    batch = ["--per_device_train_batch_size=2", f"--gradient_accumulation_steps={accumulation}"]
    results = run(without, tmp_path, *batch)
    assert results["num_updates"] == {1: 27, 2: 14}[accumulation]  # 53 rows, 2 or 4 at a time
