import itertools
import os
import re
import subprocess

import pytest
import yaml
from conftest import ROOT
from wandb.sdk.launch.sweeps.utils import (
    create_sweep_command,
    create_sweep_command_args,
)

from lib.cli.config import FLAGS
from lib.cli.parsing import parse_arguments
from lib.compare.significance import MIN_RUNS
from lib.data.tasks import TASKS
from lib.training.metrics import best_metric_name

# wandb reads it with the same loader.
SWEEP = yaml.safe_load((ROOT / "sweep.yaml").read_text())


def combinations():
    """Yield the values of each run of the grid."""
    parameters = SWEEP["parameters"]
    for values in itertools.product(*(one["values"] for one in parameters.values())):
        yield dict(zip(parameters, values, strict=True))


def started_by_agent(values, folder):
    """Return the arguments that `accelerate` gets from wandb's own command."""
    macros = create_sweep_command_args({"args": {k: {"value": v} for k, v in values.items()}})
    macros |= {"env": ["/usr/bin/env"], "program": [SWEEP["program"]]}
    command = []
    for part in create_sweep_command(list(SWEEP["command"])):
        macro = re.fullmatch(r"\$\{(\w+)\}", part)
        command += macros[macro[1]] if macro else [part]
    stand_in = folder / "accelerate"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "WANDB_RUN_ID": "abc123",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_every_run_of_the_sweep_is_a_valid_configuration(tmp_path):
    runs = list(combinations())
    for values in (runs[0], runs[-1]):
        arguments = started_by_agent(values, tmp_path)
        assert arguments[:2] == ["launch", "train_mrpc.py"]
        config = parse_arguments(arguments[2:])
        assert {field: getattr(config, field) for field in values} == values
        assert config.output_dir == "outputs/sweep/abc123"
        assert config.report_to == ("wandb",)
    for values in runs:
        parse_arguments([f"--{name}={value}" for name, value in values.items()])


@pytest.mark.parametrize("name", SWEEP["parameters"])
def test_a_parameter_is_a_flag_with_a_number(name):
    values = SWEEP["parameters"][name]["values"]
    assert name in FLAGS
    assert all(isinstance(value, int | float) for value in values), "text: write 1.0e-4"


def test_the_metric_is_one_that_runs_log():
    """test_trackers.py checks that wandb gets it under this name."""
    best = best_metric_name(TASKS["mrpc"].metrics)
    assert SWEEP["metric"] == {"name": f"eval/{best}", "goal": "maximize"}


def test_each_recipe_has_enough_seeds_for_a_verdict():
    seeds = SWEEP["parameters"]["seed"]["values"]
    assert len(set(seeds)) >= MIN_RUNS
