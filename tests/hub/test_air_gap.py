"""After --prefetch a run needs no network: it runs where there is none."""

import json
import os
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT, pairs, run_script, torchrun
from hub_server import glue, start_hub

from lib.hub.prefetch import batch_lines


def without_network(command, environment, *, loopback):
    """Run a command in a network namespace that has no route; skip where there are none."""
    if shutil.which("unshare") is None or os.getuid() != 0:
        pytest.skip("network namespaces need unshare, and root")
    enter = ["unshare", "--net"]
    if subprocess.run([*enter, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no network namespaces here")
    if loopback:
        enter += ["sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    return subprocess.run(
        [*enter, *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture(scope="module")
def prefetched(flags, bert, tmp_path_factory):
    """What --prefetch printed, the environment of the run, the commits, and the flags."""
    hub, home = start_hub(), tmp_path_factory.mktemp("home")
    hub.reset()
    model = hub.add("models/some/bert", bert)
    data = hub.add("datasets/nyu-mll/glue", glue(pairs(53, 31), pairs(23, 32)))
    arguments = [flag for flag in flags if not flag.startswith(("--train_file", "--validation_f"))]
    arguments += ["--model_name_or_path=some/bert", "--task_name=mrpc"]
    environment = hub.environment(home)
    out = home / "none"
    done = run_script([*arguments, "--prefetch", f"--output_dir={out}"], environment=environment)
    assert done.returncode == 0, done.stderr
    assert not out.exists()
    return done.stdout, environment, (model, data), arguments


@pytest.mark.processes
def test_prefetch_ends_with_the_lines_for_the_batch_script(prefetched):
    printed, environment, (model, data), arguments = prefetched
    home, cache, offline, command = printed.splitlines()[-4:]
    assert home == f"export HF_HOME={environment['HF_HOME']}"
    assert cache == f"export HF_DATASETS_CACHE={environment['HF_DATASETS_CACHE']}"
    assert offline == "export HF_HUB_OFFLINE=1"
    words = shlex.split(command)
    assert words[:3] == ["accelerate", "launch", "train_mrpc.py"]
    assert words[3 : 3 + len(arguments)] == arguments
    assert words[-2:] == [f"--model_revision={model}", f"--dataset_revision={data}"]
    assert "--prefetch" not in words


@pytest.mark.processes
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_prefetched_run_needs_no_network(prefetched, tmp_path, num_processes):
    printed, environment, (model, data), _ = prefetched
    out = tmp_path / "out"
    arguments = shlex.split(printed.splitlines()[-1])[2:]
    launcher = torchrun(2) if num_processes == 2 else torchrun(1)[:1]
    environment = {**environment, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = without_network(
        [*launcher, *arguments, f"--output_dir={out}"], environment, loopback=num_processes == 2
    )
    assert done.returncode == 0, done.stderr
    assert "the hub does not answer" not in done.stderr  # it was not even asked
    noted = json.loads((out / "manifest.json").read_text())
    assert (noted["model_revision"], noted["dataset_revision"]) == (model, data)
    assert noted["device"].startswith(f"{num_processes} x ")


def test_the_lines_leave_out_the_token_and_quote_the_rest(monkeypatch):
    monkeypatch.delenv("HF_DATASETS_CACHE")
    arguments = ["--output_dir=a b", "--prefetch", "true", "--seed", "3", "--hub_token", "***"]
    *_, command = batch_lines([*arguments, "--model-revision=main"], {"model_revision": "abc"})
    assert command == (
        "accelerate launch train_mrpc.py '--output_dir=a b' --seed 3 --model_revision=abc"
    )
