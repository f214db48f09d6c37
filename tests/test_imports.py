"""What a run imports, and when: each of these packages costs tenths of a second, or more."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

# What PyTorch, Transformers, Datasets and Accelerate import themselves is theirs to decide.
HEAVY = {"evaluate", "matplotlib", "sklearn", "tensorboard", "trackio", "wandb"}
SUBMODULES = ("scipy.stats", "transformers.pipelines", "torch.distributed.checkpoint.state_dict")

CODE = """
import json, runpy, sys
from lib.tracking.progress import Progress

def found():
    packages = {name.partition(".")[0] for name in sys.modules}
    # A module that is hidden from an import is None.
    loaded = {name for name in SUBMODULES if sys.modules.get(name) is not None}
    return sorted(packages & HEAVY | loaded)

stages = {}
first_loss = Progress.first_loss
def record(*arguments):
    stages["first update"] = found()
    return first_loss(*arguments)
Progress.first_loss = record
runpy.run_path("train_mrpc.py", run_name="__main__")
stages["end"] = found()
print(json.dumps(stages))
"""


@pytest.fixture(scope="module")
def stages(flags, tmp_path_factory):
    """The heavy packages that are loaded at the first update, and at the end of the same run."""
    folder = tmp_path_factory.mktemp("imports")
    head = f"import sys\nHEAVY, SUBMODULES = {HEAVY!r}, {SUBMODULES!r}\n"
    arguments = [*flags, "--logging_steps=5", f"--output_dir={folder / 'out'}"]
    done = subprocess.run(
        [sys.executable, "-c", head + CODE, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_the_first_update_waits_for_nothing_that_training_does_not_use(stages):
    assert stages["first update"] == []


def test_the_end_of_a_run_imports_what_its_report_needs(stages):
    """No pipelines behind `evaluate`, no scikit-learn for a curve, no tracker that is not used."""
    assert stages["end"] == ["evaluate", "matplotlib"]
