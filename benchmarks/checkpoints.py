"""How long training stands still for a checkpoint, by the size of the model.

    python -m benchmarks.checkpoints --sizes tiny minilm base large

BERTs with random weights, one after the other, through the classes that the script calls. Each
checkpoint is written twice while training waits, of which the second is shown, and three times
beside updates of 4 rows of 56 tokens, whether training leaves a core idle (OMP_NUM_THREADS=1) or
not; what these updates take longer than alone is lost. All files are in the current folder.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from lib.checkpoints import manifest
from lib.checkpoints.best_model import BestModel
from lib.checkpoints.checkpoint import Checkpoints, TrainingState
from lib.checkpoints.run_folder import CONFIG_FILE, METRICS_FILE, RunFolder
from lib.demo.corpus import MODEL_DIR
from lib.distributed.signals import Signals
from lib.distributed.stop_signal import StopSignal

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12},
    "base": {},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
PARTS = {
    "write": "lib.checkpoints.checkpoint.save_file",
    "hash": "lib.checkpoints.manifest.file_entries",
    "flush": "lib.checkpoints.checkpoint.move_into_place",
}
ROWS, TOKENS = 4, 56


class Clock:
    """Seconds, or with `--processor_seconds` those of the thread that trains."""

    now: Callable[[], float] = staticmethod(time.perf_counter)


def timed(work: Callable[..., Any], *arguments: Any, **options: Any) -> float:
    started = Clock.now()
    work(*arguments, **options)
    return Clock.now() - started


@contextmanager
def parts() -> Iterator[dict[str, float]]:
    """Yield the seconds that each part of writing takes."""
    seconds = dict.fromkeys(PARTS, 0.0)

    def measured(name: str, target: str) -> Any:
        module, function = target.rsplit(".", 1)
        original = getattr(__import__(module, fromlist=[function]), function)

        def call(*arguments: Any) -> Any:
            started = Clock.now()
            try:
                return original(*arguments)
            finally:
                seconds[name] += Clock.now() - started

        return mock.patch(target, call)

    with ExitStack() as stack:
        for name, target in PARTS.items():
            stack.enter_context(measured(name, target))
        yield seconds


class Run:
    """A model that is trained, with its checkpoints in a folder."""

    def __init__(self, size: str, path: Path) -> None:
        shape = SIZES[size]
        config = BertConfig(**shape, intermediate_size=4 * shape.get("hidden_size", 768))
        accelerator = Accelerator(cpu=True)
        self.model = accelerator.prepare(BertForSequenceClassification(config)).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.batch = {
            "input_ids": torch.randint(config.vocab_size, (ROWS, TOKENS)),
            "labels": torch.zeros(ROWS, dtype=torch.long),
        }
        for name in (METRICS_FILE, CONFIG_FILE):
            (path / name).touch()
        self.folder = RunFolder(str(path), overwrite=False, resume_from=None)
        tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        self.best = BestModel(path, accelerator, self.model, tokenizer)
        stop = StopSignal(Signals(), accelerator)
        self.checkpoints = Checkpoints(
            self.folder, {}, accelerator, self.model, self.optimizer, {}, 1, 1, stop
        )
        self.state = TrainingState(best_update=1)

    def update(self) -> None:
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, *, wait: bool) -> None:
        self.state.update += 1
        self.checkpoints.save(f"step_{self.state.update}", self.state, wait=wait)

    def beside(self, alone: float) -> tuple[float, float, float]:
        """Save beside the training; return the seconds it waits, loses later, and the write's."""
        stands = timed(self.save, wait=False)
        pending, lost, started = self.folder.pending, 0.0, time.perf_counter()
        ended: list[float] = []
        assert pending is not None, "too little memory for a copy"
        pending.add_done_callback(lambda _: ended.append(time.perf_counter()))
        while not pending.done():
            lost += timed(self.update) - alone
        self.checkpoints.wait()
        return stands, lost, ended[0] - started


def measure(size: str) -> None:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder)
        run = Run(size, path)
        run.update()
        alone = statistics.median(timed(run.update) for _ in range(3))
        best = timed(run.best.save)
        run.save(wait=True)
        with parts() as seconds:
            waits = timed(run.save, wait=True)
        with mock.patch("lib.backends.devices.leaves_a_core", return_value=True):
            first, second, third = (run.beside(alone) for _ in range(3))
        stands, lost, written = (statistics.mean(pair) for pair in zip(second, third, strict=True))
        newest = path / f"step_{run.state.update}"
        on_disk = sum(file.stat().st_size for file in newest.iterdir())
        verify = timed(manifest.verify, newest)
        load = timed(run.checkpoints.resume, newest)
        weights = sum(weight.numel() for weight in run.model.parameters())
    print(
        f"| {size} | {weights / 1e6:.1f} | {on_disk / 1e9:.2f} | {best:.2f} | {waits:.2f} | "
        + " | ".join(f"{value:.2f}" for value in seconds.values())
        + f" | {first[0]:.2f} | {stands:.2f} | {lost:.2f} | {written:.2f} | {alone:.2f} | "
        f"{verify:.2f} + {load:.2f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--processor_seconds",
        action="store_true",
        help="of the thread that trains, for a machine that does other work too; not what is lost "
        "beside a write",
    )
    arguments = parser.parse_args()
    if arguments.processor_seconds:
        Clock.now = staticmethod(time.thread_time)
    print(f"{torch.get_num_threads()} threads")
    columns = ["model", "million parameters", "GB on disk", "best model", "waiting", *PARTS]
    columns += ["first copy", "copy", "lost beside", "written in", "an update", "verify + load"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for size in arguments.sizes:
        measure(size)


if __name__ == "__main__":
    main()
