"""Tiny models and data, and real processes to run them on."""

import contextlib
import csv
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

# Before any import of the libraries that read them: no test goes to the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# DeepSpeed, which Accelerate imports where it is installed, would warn that it found no GPU.
os.environ["DS_ACCELERATOR"] = "cpu"

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
SCRIPT = ROOT / "train_mrpc.py"

sys.path.insert(0, str(ROOT))

from lib.demo.corpus import MODEL_DIR, make_pairs  # noqa: E402

SLOW_FILES = [
    "test_preemption.py",
    "test_fsdp.py",
    "test_slurm.py",
    "test_deepspeed.py",
    "test_lost_process.py",
    "test_trackers.py",
    "test_processes.py",
    "test_accelerate_configs.py",
]

NUM_TRAIN = 53  # at a global batch of 8: 7 updates of 7 or 8 rows
NUM_VALIDATION = 23


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the slow files, so that both workers are busy to the end."""
    files = [*SLOW_FILES, *dict.fromkeys(item.path.name for item in items)]
    items.sort(key=lambda item: files.index(item.path.name))


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give the tests empty caches, so that none finds what an earlier run left."""
    import datasets

    folder = tmp_path_factory.mktemp("caches")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"


@pytest.fixture(autouse=True)
def _wandb_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo that a run in this process told wandb where to write."""
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def pairs(num_pairs: int, seed: int) -> list[dict[str, Any]]:
    rows = make_pairs(num_pairs, seed=seed)
    return [{name: row[name] for name in ("sentence1", "sentence2", "label")} for row in rows]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small training, validation and test files of sentence pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    return {
        "train": write_csv(folder / "train.csv", pairs(NUM_TRAIN, 11)),
        "validation": write_csv(folder / "validation.csv", pairs(NUM_VALIDATION, 12)),
        "test": write_csv(folder / "test.csv", pairs(9, 13)),
    }


def save_tiny_bert(folder: Path, *, dropout: float, num_layers: int = 2) -> Path:
    """A random BERT of some 40,000 parameters, with the tokenizer of the demo."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
    )
    model = BertForSequenceClassification(config)
    model.bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT without dropout, so that any split of the rows gives the same gradient."""
    return save_tiny_bert(tmp_path_factory.mktemp("bert"), dropout=0.0)


@pytest.fixture(scope="session")
def dropout_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("dropout_bert"), dropout=0.1)


@pytest.fixture(scope="session")
def flags(files: dict[str, Path], bert: Path) -> list[str]:
    """A small run on the tiny BERT and the small files."""
    return [
        f"--train_file={files['train']}",
        f"--validation_file={files['validation']}",
        f"--model_name_or_path={bert}",
        "--train_batch_size=8",
        "--learning_rate=1e-3",
        # The gradient of attention's key biases is 0 but for rounding, which Adam would divide
        # by itself; with this it stays nothing.
        "--adam_epsilon=1e-5",
        "--max_length=64",
        "--logging_steps=1",
        "--num_train_epochs=1",
    ]


def run_script(
    arguments: Sequence[str],
    *,
    num_processes: int = 1,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Run the script as users do, on real processes; return its output and status."""
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = {**os.environ, **(environment or {})}
    if num_processes > 1:
        command = torchrun(num_processes) + [str(SCRIPT), *arguments]
        environment["ACCELERATE_USE_CPU"] = "true"
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def start_script(
    arguments: Sequence[str], *, num_processes: int = 1, log: Path, options: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Start the script in its own process group; append all that it prints to `log`."""
    command = [sys.executable, "-u", str(SCRIPT), *arguments]
    environment = dict(os.environ)
    if num_processes > 1:
        command = [*torchrun(num_processes), *options, str(SCRIPT), *arguments]
        environment["ACCELERATE_USE_CPU"] = "true"
        environment["PYTHONUNBUFFERED"] = "1"
    with log.open("a") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )


def wait_for(condition: Callable[[], Any], *, seconds: float = 120.0) -> Any:
    """Return what `condition` returns, as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.005)
    return found


def workers(launcher: int) -> list[int]:
    """Return the training processes that a launcher started, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [int(value[5:]) for value in variables if value.startswith(b"RANK=")]
        if parent == launcher and ranks:
            found[ranks[0]] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


def kill_all(process: subprocess.Popen[str], num_processes: int) -> None:
    """Kill all processes at once, as a power failure does."""
    pids = workers(process.pid) if num_processes > 1 else []
    for pid in [process.pid, *pids]:
        with contextlib.suppress(ProcessLookupError):  # it may just have finished
            os.kill(pid, signal.SIGKILL)
    process.wait(10)
    wait_for(lambda: not any(alive(pid) for pid in pids))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="session")
def once(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An epoch of 7 updates on one process, in one micro-batch each."""
    from runs import run

    folder = tmp_path_factory.mktemp("once")
    run(flags, folder, "--checkpointing_steps=epoch")
    return folder


@pytest.fixture(scope="session")
def two_epochs(flags: list[str], dropout_bert: Path) -> list[str]:
    """Two epochs of 7 updates of two micro-batches, with dropout."""
    return [
        *flags,
        f"--model_name_or_path={dropout_bert}",
        "--num_train_epochs=2",
        "--gradient_accumulation_steps=2",
        "--logging_steps=3",
        "--per_device_eval_batch_size=8",
    ]


@pytest.fixture(scope="session")
def checkpointed(two_epochs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of `two_epochs` with a checkpoint after each update."""
    from runs import run

    folder = tmp_path_factory.mktemp("checkpointed")
    run(two_epochs, folder, "--checkpointing_steps=1")
    return folder


@pytest.fixture(scope="session")
def long_flags(flags: list[str], dropout_bert: Path) -> list[str]:
    """Some seconds of training with dropout, over many epochs and evaluations."""
    return [
        *flags,
        f"--model_name_or_path={dropout_bert}",
        "--num_train_epochs=30",
        "--eval_every=30",
        "--checkpointing_steps=30",
        "--checkpoints_to_keep=1",
        "--logging_steps=4",
        "--per_device_eval_batch_size=2",
    ]


@pytest.fixture(scope="session")
def whole(
    long_flags: list[str], run_on: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, int], Path]:
    """The folders of uninterrupted runs of `long_flags`, by processes and accumulation."""

    @functools.cache
    def made(num_processes: int) -> Path:
        from runs import run

        folder = tmp_path_factory.mktemp("whole")
        runs = [arguments_of(long_flags, folder / f"{number}", number) for number in (1, 2)]
        if num_processes == 1:
            for accumulation, arguments in enumerate(runs, start=1):
                run(arguments, folder / f"{accumulation}")
        else:
            run_on(num_processes, *runs)
        return folder

    return lambda num_processes, accumulation: made(num_processes) / f"{accumulation}"


def arguments_of(long_flags: Sequence[str], folder: Path, accumulation: int = 1) -> list[str]:
    """Return `long_flags` with an output folder."""
    return [
        *long_flags,
        f"--output_dir={folder}",
        f"--gradient_accumulation_steps={accumulation}",
    ]


def last_update(folder: Path) -> int:
    """Return the update of the newest line of metrics.jsonl; 0 while there is none."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["update"] if lines else 0
    except (FileNotFoundError, ValueError):
        return 0


CLOCKS = (
    "examples_per_second",
    "tokens_per_second",
    "model_tflops_per_second",
    "peak_resident_memory_gib",
)


def assert_same_run(one: Path, other: Path, checkpoint: str) -> None:
    """Assert the same bits: weights, moments, log but for clocks, predictions."""
    for name in ("model.safetensors", f"{checkpoint}/model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("optimizer.safetensors", "best_model.safetensors"):
        first, second = (folder / checkpoint / name for folder in (one, other))
        assert first.read_bytes() == second.read_bytes(), name
    lines = [
        [{k: v for k, v in line.items() if k not in CLOCKS} for line in read_metrics(folder)]
        for folder in (one, other)
    ]
    assert lines[0] == lines[1]
    for path in sorted((one / "predictions").iterdir()):
        assert path.read_bytes() == (other / "predictions" / path.name).read_bytes(), path.name


def torchrun(num_processes: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={num_processes}",
    ]


@pytest.fixture(scope="session")
def run_on(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Do several runs one after the other, in one start of `num_processes` real processes.

    They draw no report.
    """

    def run(num_processes: int, *runs: Sequence[str]) -> None:
        path = tmp_path_factory.mktemp("runs") / "runs.json"
        path.write_text(json.dumps(runs))
        done = subprocess.run(
            torchrun(num_processes) + [str(ROOT / "tests" / "end_to_end" / "worker.py"), str(path)],
            cwd=ROOT,
            env={**os.environ, "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def read_metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture
def accelerate_options(monkeypatch):
    """Let the next run read Accelerate's environment variables, as a new process would."""

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)

    reset()
    yield monkeypatch
    reset()
