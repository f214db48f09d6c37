"""Accelerate reads each file, and those that need no GPU are launched."""

import json
import os
import socket
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, SCRIPT
from transformers import pipeline

from lib.demo.corpus import baselines, load_split

FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def launch(name, *arguments, options=(), **variables):
    """Start the launcher as the README does; the caller waits for it."""
    environment = {**os.environ, **variables}
    environment.pop("OMP_NUM_THREADS")
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    file = ["--config_file", str(ROOT / "accelerate_configs" / f"{name}.yaml")]
    return subprocess.Popen(
        [*launcher, *file, *options, str(SCRIPT), *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_of(process):
    try:
        printed, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    return printed


def test_each_kind_of_machine_has_a_file():
    kinds = "cpu deepspeed_zero2 fsdp2 multi_cpu multi_gpu multi_node single_gpu tpu"
    assert " ".join(path.stem for path in FILES) == kinds


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_accepts_every_key(path):
    """Its loader rejects unknown keys."""
    assert load_config_from_file(str(path)).num_processes >= 1


def test_accelerate_rejects_an_unknown_key(tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text(FILES[0].read_text() + "num_proceses: 2\n")
    with pytest.raises(ValueError, match="num_proceses"):
        load_config_from_file(str(path))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo as `make demo` runs it: its output folder."""
    folder = tmp_path_factory.mktemp("demo")
    # Two threads would wait for each other where other tests use the second core.
    options = ["--num_cpu_threads_per_process=1"]
    process = launch("cpu", "--demo", f"--output_dir={folder}", options=options)
    printed = output_of(process)
    assert process.returncode == 0, printed
    return folder


@pytest.mark.processes
def test_cpu(demo):
    manifest = json.loads((demo / "manifest.json").read_text())
    assert manifest["device"].startswith("1 x CPU")


@pytest.mark.processes
def test_the_demo_reaches_the_stated_accuracy(demo):
    results = json.loads((demo / "all_results.json").read_text())
    assert results["eval_accuracy"] >= 0.85
    assert results["eval_accuracy"] >= max(baselines().values()) + 0.10
    assert results["test_num_rows"] == 400


@pytest.mark.processes
def test_the_saved_model_of_the_demo_reproduces_the_written_predictions(demo):
    rows = load_split("validation")
    classify = pipeline("text-classification", str(demo))
    predictions = classify([{"text": r["sentence1"], "text_pair": r["sentence2"]} for r in rows])
    lines = (demo / "predictions" / "validation.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert [prediction["label"] for prediction in predictions] == [
        line["prediction"] for line in written
    ]
    for prediction, line in zip(predictions, written, strict=True):
        assert prediction["score"] == pytest.approx(max(line["probabilities"].values()), abs=1e-4)


@pytest.mark.processes
def test_multi_cpu(flags, tmp_path):
    """The rows are tokenized once for both processes."""
    process = launch(
        "multi_cpu", *flags, f"--output_dir={tmp_path / 'out'}", "--max_train_steps=2",
        ACCELERATE_USE_CPU="true", HF_DATASETS_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    printed = output_of(process)
    assert process.returncode == 0, printed
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["device"].startswith("2 x CPU")
    caches = sorted(path.name for path in (tmp_path / "cache").rglob("mapped/*/*.arrow"))
    assert caches == ["train.arrow", "validation.arrow"]


@pytest.mark.processes
@pytest.mark.parametrize(("name", "num_processes"), [("single_gpu", 1), ("multi_gpu", 2)])
def test_the_files_for_gpus_run_on_cpus(flags, tmp_path, name, num_processes):
    process = launch(
        name,
        *[*flags, f"--output_dir={tmp_path}", "--max_train_steps=2"],
        options=[f"--num_processes={num_processes}"],
        ACCELERATE_USE_CPU="true",
    )
    printed = output_of(process)
    assert process.returncode == 0, printed
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["device"].startswith(f"{num_processes} x CPU")
    assert manifest["precision"] == "bf16"


@pytest.mark.processes
def test_two_machines(flags, tmp_path):
    """Two launchers with one process each, which meet by address and port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [*flags, f"--output_dir={tmp_path}", "--max_train_steps=2"]
    machines = [
        launch(
            "multi_node",
            *arguments,
            options=["--num_processes=2", f"--machine_rank={rank}", f"--main_process_port={port}"],
            ACCELERATE_USE_CPU="true",
        )
        for rank in range(2)
    ]
    printed = [output_of(machine) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], printed
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["device"].startswith("2 x CPU")
    assert manifest["precision"] == "bf16"


@pytest.mark.processes
def test_rejects_several_gpus_without_a_gpu(flags, tmp_path):
    """Accelerate would start two whole trainings into one folder."""
    process = launch(
        "multi_gpu", *flags, f"--output_dir={tmp_path / 'out'}", options=["--num_processes=2"]
    )
    printed = output_of(process)
    assert process.returncode != 0
    assert printed.count("they do not see each other") == 1
    assert not (tmp_path / "out").exists()
