"""The measurements of a GPU at toy size, in this process on the CPU."""

import contextlib
import io
import json
import sys
import time

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import gpu, gpu_check, plain_loop
from lib.cli.parsing import parse_arguments
from lib.distributed.signals import Signals
from lib.report import results
from train_mrpc import main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these run on CPUs")


@pytest.fixture
def in_this_process(accelerate_options, monkeypatch):
    """Do the runs here, with Accelerate's options as the launcher would pass them."""

    def start(arguments, seconds):
        place = arguments.index("-m")
        options, (module, *flags) = arguments[:place], arguments[place + 1 :]
        values = dict(option[2:].split("=") for option in options if option.startswith("--"))
        accelerate_options.setenv("ACCELERATE_MIXED_PRECISION", values["mixed_precision"])
        accelerate_options.setenv("ACCELERATE_DYNAMO_BACKEND", values["dynamo_backend"].upper())
        AcceleratorState._reset_state(reset_partial_state=True)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        accelerate_options.setattr(sys, "argv", [module, *flags])
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            plain_loop.main() if module == "benchmarks.plain_loop" else gpu_check.main(flags)
        return 0, printed.getvalue()

    monkeypatch.setattr(results, "write_report", lambda *_: None)
    monkeypatch.setattr(gpu, "start", start)
    monkeypatch.setattr(
        gpu_check, "run_script", lambda flags: main(parse_arguments(flags), Signals())
    )


def test_the_table_on_a_cpu(in_this_process, capsys, tmp_path):
    assert gpu.main(["--pairs=1", f"--json={tmp_path / 'gpu.json'}"]) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    figures = {row["what"]: row["figure"] for row in rows}
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:] == [f"{name:<44}{figure}" for name, figure in figures.items()]
    absent = {name for name, figure in figures.items() if figure == "not here: no GPU"}
    assert absent == {
        "that it does not synchronize",
        "that a CUDA graph reads a new seed",
        "host synchronizations",
        "compiled, host synchronizations",
    }
    assert "examples/s, " in figures["train_mrpc.py, median of 1"]
    assert "x the plain loop; " in figures["train_mrpc.py, compiled"]


def test_what_cannot_be_measured_is_named_and_the_rest_is_measured(monkeypatch, capsys, tmp_path):
    def failing(bench):
        yield "first", "1"
        raise ImportError("no such library")

    monkeypatch.setattr(gpu, "prepare", lambda bench: None)
    monkeypatch.setitem(gpu.PARTS, "seeds", failing)
    monkeypatch.setitem(gpu.PARTS, "matrix", lambda bench: iter([("last", "2")]))
    assert gpu.main(["--only", "seeds", "compiled", "matrix", "--minutes=0"]) == 1
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines[0] == ["first", "1"]
    assert lines[1] == ["seeds", "ImportError: no such library"]
    assert lines[2][0] == "compiled"
    assert lines[2][1].startswith("Failed: left out")
    assert lines[3] == ["last", "2"]


def test_the_share_of_the_matrix_rate_of_bert_base(tmp_path):
    """Of a token: 6 x (11 x 7,077,888 + 2 x 589,824) weights + 12 x 768 x (11 x 53 + 1)."""
    bench = gpu.Bench(tmp_path, False, 1, time.monotonic(), {"matrix_rate": 1e12})
    assert gpu._share_of_rate(bench, 1000.0) == "48.0%"


def test_pairs_have_the_lengths_of_mrpc(tmp_path):
    from transformers import AutoTokenizer

    gpu.prepare(gpu.Bench(tmp_path, True, 1, time.monotonic()))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    lines = (tmp_path / "pairs" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    lengths = [len(tokenizer(row["sentence1"], row["sentence2"])["input_ids"]) for row in rows]
    assert len(rows) == 128
    assert sum(lengths) / len(lengths) == pytest.approx(53, abs=0.5)
    assert min(lengths) >= 19
    assert max(lengths) <= 103
