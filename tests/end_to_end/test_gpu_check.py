"""The check on a GPU at toy size: in this process on the CPU, and once as users start it."""

import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT
from transformers.models.bert.modeling_bert import BertPooler

from benchmarks import gpu_check
from lib.cli.parsing import parse_arguments
from lib.distributed.signals import Signals
from lib.report import results
from lib.training.meter import Meter
from train_mrpc import main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these run on CPUs")


class Killed(BaseException):
    """In place of SIGKILL."""


@pytest.fixture
def in_this_process(monkeypatch):
    """Do the runs here, with Accelerate's options as the launcher would pass them.

    Where the loss scale is to overflow, Accelerate uses fp16 and a scaler on the CPU. Of the three
    compiled runs only that whose graphs are counted is compiled: Dynamo takes 5 s for each.
    """
    make = Accelerator.__init__

    def with_scaler(accelerator, *positional, **options):
        make(accelerator, *positional, **options)
        if accelerator.mixed_precision == "fp16":
            accelerator.native_amp = True
            scale = gpu_check.OVERFLOWING_SCALE
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def kill(*_):
        raise Killed

    def start(arguments):
        options, flags = arguments[: arguments.index("-m")], arguments[arguments.index("-m") + 2 :]
        values = dict(option[2:].split("=") for option in options if option.startswith("--"))
        precision = "fp16" if "init_scale" in flags[1] else values["mixed_precision"]
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        backend = values["dynamo_backend"].upper() if "compiled" in flags[1] else "NO"
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        AcceleratorState._reset_state(reset_partial_state=True)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        try:
            gpu_check.main(flags)
        except Killed:
            return -signal.SIGKILL, ""
        finally:
            torch.use_deterministic_algorithms(False)
        return 0, ""

    monkeypatch.setattr(Accelerator, "__init__", with_scaler)
    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(results, "write_report", lambda *_: None)
    monkeypatch.setattr(gpu_check, "start", start)
    monkeypatch.setattr(
        gpu_check, "run_script", lambda flags: main(parse_arguments(flags), Signals())
    )
    yield monkeypatch
    AcceleratorState._reset_state(reset_partial_state=True)


def rows_of(capsys):
    """Return the printed result and figure of each check."""
    _, *printed = capsys.readouterr().out.splitlines()
    found = {}
    for name in gpu_check.CHECKS:
        for line in printed:
            if line.startswith(f"{name:<32}"):
                found[name] = (line[32:42].strip(), line.partition(" s  ")[2])
    return found


def test_the_table_on_a_cpu(in_this_process, capsys, tmp_path):
    assert gpu_check.main(["--json", str(tmp_path / "table.json")]) == 0
    rows = rows_of(capsys)
    assert rows.keys() == gpu_check.CHECKS.keys()
    passed = {name for name, (result, _) in rows.items() if result == "passed"}
    assert passed == {"fp32", "bf16", "killed and resumed", "torch.compile"}
    assert {row for name, row in rows.items() if name not in passed} == {("not here", "no GPU")}
    assert "bits equal, with the scaler" in rows["killed and resumed"][1]
    written = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {row["what"]: (row["result"], row["figure"]) for row in written} == rows


def test_overflows_are_counted(in_this_process, tmp_path):
    figure = gpu_check.check_overflow(gpu_check.Bench(tmp_path, toy=True))
    skipped, scale = int(figure.split()[0]), float(figure.split("scale ")[1].split(",")[0])
    assert scale == gpu_check.OVERFLOWING_SCALE / 2**skipped


def test_a_check_that_fails_is_named_and_gives_exit_status_1(in_this_process, capsys):
    """bf16 on other batches than fp32."""
    flags = gpu_check.Bench.flags

    def other(bench, folder, *, dropout):
        seed = ["--seed=7"] if folder.name == "bf16" else []
        return [*flags(bench, folder, dropout=dropout), *seed]

    in_this_process.setattr(gpu_check.Bench, "flags", other)
    in_this_process.setattr(gpu_check, "CHECKS", {
        name: gpu_check.CHECKS[name] for name in ("fp32", "bf16")
    })  # fmt: skip
    assert gpu_check.main([]) == 1
    rows = rows_of(capsys)
    assert rows["fp32"][0] == "passed"
    assert rows["bf16"][0] == "failed"
    assert "losses differ by" in rows["bf16"][1]


def test_synchronizations_count_between_readings_only(in_this_process, tmp_path):
    """A stand-in for CUDA warns in each forward pass, after it, and at the end of the run."""
    mode = {"now": "default"}
    in_this_process.setattr(
        torch.cuda, "set_sync_debug_mode", lambda name: mode.__setitem__("now", name)
    )

    def synchronizing(method):
        def call(*arguments):
            if mode["now"] == "warn":
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            return method(*arguments)

        return call

    in_this_process.setattr(BertPooler, "forward", synchronizing(BertPooler.forward))
    in_this_process.setattr(Meter, "add_loss", synchronizing(Meter.add_loss))
    in_this_process.setattr(Meter, "overall", synchronizing(Meter.overall))
    bench = gpu_check.Bench(tmp_path, toy=True)
    bench.run("watched", count_syncs=True)
    seen = bench.watched("watched")
    for kind, file in (("syncs", "train_mrpc.py"), ("syncs_in_model", "modeling_bert.py")):
        ((place, count),) = seen[kind].items()
        assert place.startswith(f"{file}:")
        assert count == bench.num_updates - gpu_check.WARM_UP_UPDATES


@pytest.mark.processes
def test_through_the_launcher(tmp_path):
    """One process; and the two ranks, which are on CPUs here."""
    code = (
        "import sys; from benchmarks import gpu_check as g; "
        "g.CHECKS['two ranks on one GPU, gloo'] = (g.check_two_ranks, False); "
        "sys.exit(g.main(sys.argv[1:]))"
    )
    path = tmp_path / "table.json"
    done = subprocess.run(
        [sys.executable, "-c", code, "--json", str(path)]
        + ["--only", "fp32", "FSDP2, one rank", "two ranks on one GPU, gloo"],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["what"]: row for row in json.loads(path.read_text())["rows"]}
    assert [row["result"] for row in rows.values()] == ["passed", "not here", "passed"]
