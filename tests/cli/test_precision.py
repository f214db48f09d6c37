"""`--mixed_precision`: what it asks Accelerate for, and what auto decides."""

import json
import os
import re
import subprocess

import pytest
import yaml
from conftest import ROOT, read_metrics, torchrun
from runs import run

from lib.backends import devices
from lib.backends.settings import use_precision
from lib.cli.config import TrainConfig
from lib.cli.parsing import parse_arguments
from lib.cli.rules import resolve_precision
from lib.cli.startup import start
from lib.errors import InputError

TOLD = "ACCELERATE_MIXED_PRECISION"


def precision_of(folder):
    """The precision in config.yaml, and that in which the run really trained."""
    manifest = json.loads((folder / "manifest.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return config["mixed_precision"], manifest["precision"]


@pytest.mark.parametrize("more", [["--mixed_precision=bf16"], ["--bf16"]])
def test_accelerate_is_asked_for_the_precision_of_the_flag(
    flags, tmp_path, accelerate_options, more
):
    """Also in Python, where `start` is not called."""
    accelerate_options.setenv(TOLD, "no")  # as the launcher does where it was told nothing
    run(flags, tmp_path, "--max_train_steps=1", *more)
    assert precision_of(tmp_path) == ("bf16", "bf16")


def test_a_precision_that_contradicts_the_launcher_is_an_error(monkeypatch, tmp_path, capsys):
    environment = {TOLD: "fp16"}
    use_precision(environment, None)
    use_precision(environment, "fp16")
    for wanted in ("no", "bf16", "auto"):
        with pytest.raises(
            InputError,
            match=f"--mixed_precision {wanted} contradicts accelerate launch --mixed_prec.* fp16",
        ):
            use_precision(environment, wanted)
    assert environment == {TOLD: "fp16"}
    monkeypatch.setenv(TOLD, "bf16")
    with pytest.raises(SystemExit) as left:
        start(["train_mrpc.py", "--demo", f"--output_dir={tmp_path / 'out'}", "--fp16"])
    assert left.value.code == 2
    assert capsys.readouterr().err.count("--mixed_precision fp16 contradicts") == 1


def test_a_precision_that_accelerate_can_no_longer_change_is_an_error(
    flags, tmp_path, accelerate_options
):
    """It keeps the precision of the first Accelerator of a process."""
    accelerate_options.setenv(TOLD, "no")
    run(flags, tmp_path / "first", "--max_train_steps=1")
    with pytest.raises(InputError, match="--mixed_precision bf16: .* start a new process"):
        run(flags, tmp_path / "second", "--mixed_precision=bf16")
    assert not (tmp_path / "second").exists()


def test_yaml_reads_no_as_false(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("mixed_precision: no\n")
    assert parse_arguments(["--config", str(path)]).mixed_precision == "no"


def test_auto_is_what_the_device_computes_in(monkeypatch):
    monkeypatch.setattr(devices, "computes_in_bf16", lambda _: True)
    found = {kind: devices.fastest_precision(devices.torch.device(kind)) for kind in ("cpu", "mps")}
    assert found == {"cpu": "bf16", "mps": "no"}
    monkeypatch.setattr(devices, "computes_in_bf16", lambda _: False)
    assert devices.fastest_precision(devices.torch.device("cuda")) == "no"


def test_a_run_keeps_the_precision_that_it_began_with(flags, tmp_path, accelerate_options):
    """Stopped after 3 updates, it goes on where the processor has no bf16."""
    accelerate_options.setenv(TOLD, "no")
    auto = [*flags, "--mixed_precision=auto"]
    accelerate_options.setattr(devices, "fastest_precision", lambda _: "bf16")
    run(auto, tmp_path / "whole")
    run(auto, tmp_path / "resumed", "--max_train_steps=3")
    assert precision_of(tmp_path / "resumed") == ("bf16", "bf16")

    accelerate_options.setenv(TOLD, "no")
    accelerate_options.setattr(devices, "fastest_precision", lambda _: "no")
    run(auto, tmp_path / "resumed", "--max_train_steps=7")
    assert precision_of(tmp_path / "resumed") == ("bf16", "bf16")
    assert read_metrics(tmp_path / "resumed")[-1]["update"] == 7


def test_another_precision_than_that_of_the_checkpoint_is_refused(
    flags, once, tmp_path, accelerate_options
):
    accelerate_options.setenv(TOLD, "no")
    accelerate_options.setattr(devices, "fastest_precision", lambda _: "bf16")
    resumed = f"--resume_from_checkpoint={once / 'epoch_0'}"
    with pytest.raises(InputError, match="precision 'no' there, 'bf16' here"):
        run(flags, tmp_path, "--mixed_precision=auto", resumed, "--num_train_epochs=2")


def test_a_file_for_deepspeed_may_not_contradict_what_auto_chose(tmp_path, accelerate_options):
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": False}}))
    accelerate_options.setenv(TOLD, "no")
    accelerate_options.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    accelerate_options.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    config = TrainConfig(demo=True, mixed_precision="auto")
    with pytest.raises(InputError, match="bf16.enabled is false, but --mixed_precision is bf16"):
        resolve_precision(config, {"mixed_precision": "bf16"})


WORKER = """
import os, sys
from lib.backends import devices
from lib.cli.config import TrainConfig
from lib.cli.rules import resolve_precision
from lib.cli.startup import exit_status
from lib.distributed.process_group import process_group

rank = int(os.environ["RANK"])
config = TrainConfig(demo=True, mixed_precision="auto")
with exit_status(), process_group(60.0):
    for both, before in ((("bf16", "no"), {}), (("bf16", "bf16"), {}), (("no", "no"), "bf16")):
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
        devices.fastest_precision = lambda _: both[rank]
        # Only the main process is sure to see the folder of the run.
        seen = {"mixed_precision": before} if before and rank == 0 else {}
        resolved = resolve_precision(config, seen).mixed_precision
        assert os.environ["ACCELERATE_MIXED_PRECISION"] == resolved
        print(f"<{rank}:{resolved}>", flush=True)
"""


@pytest.mark.processes
def test_processes_on_different_processors_agree(tmp_path):
    """bf16 only if both compute in it, or if the run that the main process resumes has it."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = subprocess.run(
        [*torchrun(2), str(script)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in "01":
        assert re.findall(rf"<{rank}:(\w+)>", done.stdout) == ["no", "bf16", "bf16"]
