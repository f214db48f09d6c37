"""What a task of srun becomes is what `accelerate launch` would have started."""

import os
import sys
import types

import pytest
from accelerate.commands import launch
from conftest import ROOT

from lib.backends import launcher
from lib.errors import InputError

SCRIPT = ["train_mrpc.py", "--seed=7", "--config", "flags.yaml"]


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """The fourth task of a node, and the twelfth of all."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.update(
        SLURM_PROCID="11", SLURM_LOCALID="3", SLURM_NTASKS="16", MASTER_ADDR="10.0.0.1"
    )


def yaml_of(name):
    return str(ROOT / "accelerate_configs" / f"{name}.yaml")


@pytest.fixture
def by_accelerate(monkeypatch):
    """The environment in which Accelerate's own launcher starts torchrun."""

    def environment(*options):
        found = {}
        monkeypatch.setattr("torch.distributed.run.run", lambda _: found.update(os.environ))
        # It would only be asked for the name of a file.
        runner = types.SimpleNamespace(DEEPSPEED_ENVIRONMENT_NAME="")
        monkeypatch.setitem(sys.modules, "deepspeed.launcher.runner", runner)
        monkeypatch.setattr(launch, "is_deepspeed_available", lambda: True)
        launch.launch_command(launch.launch_command_parser().parse_args([*options, *SCRIPT]))
        return found

    return environment


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("multi_gpu", []),
        ("fsdp2", ["--mixed_precision=no", "--fsdp_offload_params=true"]),
        ("deepspeed_zero2", ["--dynamo_backend=no"]),
    ],
)
def test_the_environment_is_that_of_accelerate_launch(by_accelerate, name, more):
    options = ["--config_file", yaml_of(name), *more]
    command, environment = launcher.task_of_srun([*options, *SCRIPT])
    assert command == [sys.executable, *SCRIPT]
    own = {"RANK": "11", "LOCAL_RANK": "3", "WORLD_SIZE": "16"}
    assert environment == by_accelerate(*options) | own


def test_a_module_is_run_as_one():
    command, _ = launcher.task_of_srun(
        ["--config_file", yaml_of("multi_node"), "--module", "lib.doctor", "--demo"]
    )
    assert command == [sys.executable, "-m", "lib.doctor", "--demo"]


def test_the_number_of_machines_in_the_file_is_not_looked_at():
    """It would look for its own port, and for the address of the first machine."""
    _, environment = launcher.task_of_srun(["--config_file", yaml_of("multi_node"), *SCRIPT])
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert environment["WORLD_SIZE"] == "16"
    assert environment["MASTER_ADDR"] == "10.0.0.1"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be used: .* No such file"),
        ("", "must hold a 'name: value' line"),
        ("a: [", "while parsing"),
        ("distributed_type: FSDP\nnum_procs: 2\n", "num_procs"),
        ("distributed_type: 'NO'\n", "distributed_type is NO: srun starts MULTI_GPU, FSDP or"),
    ],
)
def test_rejects_a_file_that_starts_no_task(tmp_path, content, words):
    path = tmp_path / "file.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=words) as rejected:
        launcher.task_of_srun(["--config_file", str(path), *SCRIPT])
    assert str(path) in str(rejected.value)
    assert "\n" not in str(rejected.value)


def test_one_task_prints_the_error(capsys):
    for task in ("0", "1"):
        os.environ["SLURM_PROCID"] = task
        with pytest.raises(SystemExit, match="2"):
            launcher.main(["--config_file", "none.yaml", *SCRIPT])
    assert capsys.readouterr().err.count("error: --config_file none.yaml cannot be used") == 1


def test_rejects_a_start_without_srun():
    del os.environ["SLURM_PROCID"]
    with pytest.raises(InputError, match="SLURM_PROCID is not set.* use accelerate launch"):
        launcher.task_of_srun(["--config_file", yaml_of("fsdp2"), *SCRIPT])
