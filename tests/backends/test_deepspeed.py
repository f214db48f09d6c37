"""ZeRO-2 on two processes through gloo, from the file that is shipped."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import (
    ROOT,
    assert_same_run,
    last_update,
    read_metrics,
    read_weights,
    run_script,
    wait_for,
    workers,
)
from runs import assert_same_course, run
from transformers import AutoModelForSequenceClassification

from lib.backends.deepspeed import check_settings
from lib.errors import InputError

NUM_KILLS = int(os.environ.get("TORTURE_KILLS", "1"))
SHIPPED = ROOT / "accelerate_configs" / "deepspeed_zero2.yaml"

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: make deepspeed",
)


def launch(arguments, log, *, config=SHIPPED, **variables):
    """Start two processes with `accelerate launch`; append all that they print to `log`."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={config}"]
    worker = str(ROOT / "tests" / "backends" / "deepspeed_on_cpu.py")
    with log.open("a") as file:
        return subprocess.Popen(
            [*launcher, "--num_processes=2", worker, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1", **variables},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def launch_runs(folder, *runs, **how):
    """Do several runs in one launch; return its exit status and what it printed."""
    (folder / "runs.json").write_text(json.dumps(runs))
    process = launch([folder / "runs.json"], folder / "log", **how)
    try:
        return process.wait(200), (folder / "log").read_text()
    finally:
        process.kill()


def configured(path, **deepspeed_config):
    """Write the shipped file in fp32 with other settings of DeepSpeed, and return its path."""
    config = yaml.safe_load(SHIPPED.read_text())
    del config["mixed_precision"]
    path.write_text(yaml.safe_dump({**config, "deepspeed_config": deepspeed_config}))
    return path


@pytest.fixture(scope="module")
def in_fp32(flags, tmp_path_factory):
    """Runs whose configuration accumulates, as `accelerate config` writes it, and a NaN."""
    folder = tmp_path_factory.mktemp("in_fp32")
    epoch, third = "--checkpointing_steps=epoch", "--checkpointing_steps=3"
    run(flags, folder / "plain", third)
    status, printed = launch_runs(
        folder,
        [*flags, epoch, f"--output_dir={folder / 'whole'}"],
        [*flags, third, f"--output_dir={folder / 'sharded'}"],
        [*flags, epoch, f"--output_dir={folder / 'from plain'}",
         f"--resume_from_checkpoint={folder / 'plain' / 'step_3'}"],
        [*flags, "--checkpointing_steps=1", f"--output_dir={folder / 'poisoned'}"],
        config=configured(folder / "config.yaml", zero_stage=2, gradient_accumulation_steps=2),
        NAN_AT=f"1 {7 + 7 + 4 + 2}",
    )  # fmt: skip
    assert (folder / "poisoned").exists(), printed
    run(flags, folder / "from shards", epoch,
        f"--resume_from_checkpoint={folder / 'sharded' / 'step_3'}")  # fmt: skip
    return folder, status, printed


@needs_deepspeed
@pytest.mark.processes
@pytest.mark.parametrize("name", ["whole", "from plain", "from shards"])
def test_zero2_takes_the_course_of_one_process_and_shares_its_checkpoints(in_fp32, once, name):
    folder = in_fp32[0] / name
    assert_same_course(folder, once)
    evaluations = [
        [line for line in read_metrics(run) if "eval_accuracy" in line] for run in (folder, once)
    ]
    assert evaluations[0] == [pytest.approx(line, abs=1e-6) for line in evaluations[1]]


@needs_deepspeed
@pytest.mark.processes
def test_the_flags_decide_on_accumulation(in_fp32):
    said = "gradient_accumulation_steps is 2 in its configuration: training with 1"
    assert in_fp32[2].count(said) == 4  # once for each run


@needs_deepspeed
@pytest.mark.processes
def test_a_nan_on_one_rank_ends_the_run_with_one_message(in_fp32):
    folder, status, printed = in_fp32
    assert status == 1
    assert printed.count("update 3 is not finite; the update was not applied") == 1
    checkpoints = sorted((folder / "poisoned").glob("step_*"))
    assert [path.name for path in checkpoints] == ["step_1", "step_2"]
    for weight in read_weights(checkpoints[1]).values():
        assert weight.isfinite().all()


@pytest.fixture(scope="module")
def shipped_flags(flags, dropout_bert):
    """Seconds of training in bf16, with dropout, evaluations and checkpoints."""
    return [
        *flags,
        f"--model_name_or_path={dropout_bert}",
        "--gradient_accumulation_steps=2",
        "--num_train_epochs=8",
        "--eval_every=14",
        "--checkpointing_steps=7",
        "--checkpoints_to_keep=1",
        "--logging_steps=2",
    ]


@pytest.fixture(scope="module")
def uninterrupted(shipped_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish([*shipped_flags, f"--output_dir={folder / 'out'}"], folder / "log")
    return folder / "out"


def finish(arguments, log):
    assert launch(arguments, log).wait(200) == 0, log.read_text()


def stop(arguments, folder, log, send):
    """Start a run, `send` signals once it trains, and return what it printed."""
    length, first = log.stat().st_size if log.exists() else 0, last_update(folder)
    process = launch(arguments, log)
    wait_for(lambda: last_update(folder) > first or process.poll() is not None)
    send(process)
    process.wait(60)
    return log.read_text()[length:]


def signal_ranks(name, *, after=0.0):
    def send(process):
        time.sleep(after)
        for pid in workers(process.pid):
            os.kill(pid, signal.Signals[name])

    return send


@needs_deepspeed
@pytest.mark.processes
def test_killed_anywhere_the_result_is_the_same(shipped_flags, uninterrupted, tmp_path):
    """As shipped, in bf16: SIGTERM, SIGKILL at random moments, then the end."""
    moments = random.Random("ZeRO-2")
    folder, log = tmp_path / "out", tmp_path / "log"
    arguments = [*shipped_flags, f"--output_dir={folder}"]
    printed = stop(arguments, folder, log, signal_ranks("SIGTERM"))
    assert printed.count("train_mrpc.py: stopped by SIGTERM after update") == 1
    assert printed.count("exitcode  : 75") == 2
    assert json.loads((folder / "status.json").read_text())["status"] == "preempted"
    for kill in range(NUM_KILLS):
        stop(arguments, folder, log, signal_ranks("SIGKILL", after=moments.uniform(0, 1)))
        if json.loads((folder / "status.json").read_text())["status"] == "finished":
            assert_same_run(folder, uninterrupted, "step_56")
            folder = tmp_path / f"after {kill + 1} kills"
            arguments = [*shipped_flags, f"--output_dir={folder}"]
    finish(arguments, log)
    assert_same_run(folder, uninterrupted, "step_56")


@needs_deepspeed
@pytest.mark.processes
def test_the_export_holds_the_weights_in_fp32(uninterrupted):
    assert json.loads((uninterrupted / "manifest.json").read_text())["precision"] == "bf16"
    model = AutoModelForSequenceClassification.from_pretrained(uninterrupted)
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.float32, name
    dense = model.bert.encoder.layer[0].output.dense.weight
    assert (dense.bfloat16().float() != dense).float().mean() > 0.9


@needs_deepspeed
@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_fp16_supported(),  # what DeepSpeed asks
    reason="this processor does not multiply in fp16",
)
@pytest.mark.processes
def test_a_file_of_deepspeed_in_fp16_resumes_with_the_loss_scale(two_epochs, tmp_path):
    """The scale starts so high that the first updates overflow, and grows after each other one."""
    settings = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 2},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(settings))
    config = configured(tmp_path / "config.yaml", deepspeed_config_file=str(file))
    runs = [[*two_epochs, "--checkpointing_steps=7", f"--output_dir={tmp_path / name}"]
            for name in ("whole", "resumed")]  # fmt: skip
    checkpoint = tmp_path / "whole" / "step_7"
    status, printed = launch_runs(
        tmp_path, runs[0], [*runs[1], f"--resume_from_checkpoint={checkpoint}"], config=config
    )
    assert status == 0, printed
    state = json.loads((checkpoint / "training_state.json").read_text())
    assert 1 < state["objects"]["deepspeed_scaler"]["cur_scale"] < 2**20
    assert_same_run(tmp_path / "resumed", tmp_path / "whole", "step_14")


REFUSED = {
    "stage 3": ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, but"),
    "no stage": ({"bf16": {"enabled": "auto"}}, "zero_optimization.stage is None, but"),
    "an optimizer": ({"optimizer": {"type": "Adam"}}, "does not support optimizer.type: remove"),
    "offloading": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        "does not support zero_optimization.offload_optimizer.device: remove it",
    ),
    "another precision": (
        {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}},
        "fp16.enabled is true, but --mixed_precision is bf16: set it to auto",
    ),
    "no object": ([2], "is not a readable JSON object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_it_does_not_honor(monkeypatch, tmp_path, name):
    settings, message = REFUSED[name]
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(settings))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(InputError, match=message):
        check_settings()


@pytest.mark.parametrize("name", ["offload_optimizer_device", "offload_param_device"])
def test_refuses_to_offload(monkeypatch, name):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name.upper()}", "cpu")
    with pytest.raises(InputError, match=f"does not support {name} .cpu.: remove it"):
        check_settings()


def test_refuses_a_setting_that_stands_in_both_files(monkeypatch, tmp_path):
    """Accelerate ends with a traceback."""
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "deepspeed_config_file,zero_stage")
    with pytest.raises(InputError, match="and zero_stage are both in the configuration"):
        check_settings()


@pytest.mark.processes
def test_refuses_zero3_on_all_processes(flags, tmp_path):
    """Loading a model would wait for ever: `zero.Init` communicates, and one rank loads first."""
    variables = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    done = run_script(
        [*flags, f"--output_dir={tmp_path / 'out'}"], num_processes=2, environment=variables
    )
    assert done.returncode != 0
    assert "zero_stage is 3, but this script runs ZeRO-2 only" in done.stderr
    assert done.stderr.count("error: deepspeed_config") == 1
    assert not (tmp_path / "out").exists()
