"""What a run imports, and when: each of these packages costs tenths of a second, or more."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

# Packages that cost tenths of a second, or more, and parts of others that do.
HEAVY = {"evaluate", "matplotlib", "sklearn", "tensorboard", "trackio", "wandb"}
SUBMODULES = ("scipy.stats", "transformers.pipelines", "torch.distributed.checkpoint.state_dict")

FOUND = """
import json, runpy, sys

def found():
    # A module that is hidden from an import is None.
    loaded = {name for name, module in sys.modules.items() if module is not None}
    packages = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    return sorted(packages | {name for name in SUBMODULES if name in loaded})

stages = {}
"""

RUN = """
from lib.tracking.progress import Progress

first_loss = Progress.first_loss
def record(*arguments):
    stages["first update"] = found()
    return first_loss(*arguments)
Progress.first_loss = record
runpy.run_path("train_mrpc.py", run_name="__main__")
stages["end"] = found()
"""

# Ends before it imports what a run needs.
ENDS_EARLY = """
try:
    runpy.run_path("train_mrpc.py", run_name="__main__")
except SystemExit as left:
    assert not left.code
stages["end"] = found()
"""

# What these import themselves is theirs to decide. Accelerate takes a model out of its wrapper,
# also for `save_pretrained`, and imports DeepSpeed for it where it is installed.
LIBRARIES = """
import accelerate, datasets, torch
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, get_scheduler
accelerate.utils.extract_model_from_parallel(torch.nn.Linear(1, 1))
stages["first update"] = found()
import lib.report.page.render
from lib.training.metrics import glue_metric
glue_metric(["f1"], regression=False)
stages["end"] = found()
"""


def stages_of(code, *arguments):
    """The packages, but for parts of their extensions, that are loaded at each stage of `code`."""
    head = f"SUBMODULES = {SUBMODULES!r}\n{FOUND}"
    done = subprocess.run(
        [sys.executable, "-c", f"{head}{code}\nprint(json.dumps(stages))", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    stages = json.loads(done.stdout.splitlines()[-1])
    return {
        stage: {name for name in names if not name.startswith(("_", "cython_runtime"))}
        for stage, names in stages.items()
    }


@pytest.fixture(scope="module")
def arguments(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imports")
    return [*flags, "--logging_steps=5", f"--output_dir={folder / 'out'}"]


@pytest.fixture(scope="module")
def stages(arguments):
    """What is loaded at the first update, and at the end of the same run."""
    return stages_of(RUN, *arguments)


@pytest.fixture(scope="module")
def libraries():
    """What the libraries that a run needs load for themselves, by the same stages."""
    return stages_of(LIBRARIES)


def test_help_imports_no_package():
    assert stages_of(ENDS_EARLY, "--help")["end"] == {"lib"}


def test_the_first_update_waits_for_nothing_that_training_does_not_use(stages, libraries):
    assert stages["first update"] - libraries["first update"] == {"lib"}
    assert not stages["first update"] & {*HEAVY, *SUBMODULES}


def test_the_end_of_a_run_imports_what_its_report_needs(stages, libraries):
    """No pipelines behind `evaluate`, no scikit-learn for a curve, no tracker that is not used."""
    assert stages["end"] - libraries["end"] == set()
    assert stages["end"] & {*HEAVY, *SUBMODULES} == {"evaluate", "matplotlib"}


def test_a_finished_run_is_read_without_torch(stages, arguments):
    loaded = stages_of(ENDS_EARLY, *arguments)["end"]
    assert loaded == {"filelock", "lib", "numpy", "safetensors", "yaml"}
