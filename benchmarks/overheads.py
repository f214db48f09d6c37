"""What asking whether to stop, and tracking, cost in each update of the demo.

    python -m benchmarks.overheads

The demo is run for the time of an update. Then the same calls are made many times: the agreement of
two processes on this machine (gloo), and a line logged to an offline wandb run.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from accelerate import Accelerator

from lib.distributed.signals import Signals
from lib.distributed.stop_signal import StopSignal
from lib.tracking.trackers import Trackers

ROOT = Path(__file__).parent.parent
NUM_CALLS = 1000
LOGGING_STEPS = 10  # the script's default


def seconds_per_update() -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train_mrpc.py", "--demo", f"--output_dir={folder}"]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        results = json.loads((Path(folder) / "all_results.json").read_text())
    return 32 / float(results["train_examples_per_second"])


def agreement() -> None:
    """Print the seconds of one agreement; run by two processes."""
    accelerator = Accelerator(cpu=True)
    asking = StopSignal(Signals(), accelerator)
    for _ in range(100):
        asking.check()
    started = time.perf_counter()
    for _ in range(NUM_CALLS):
        asking.check()
    if accelerator.is_main_process:
        print((time.perf_counter() - started) / NUM_CALLS)
    accelerator.end_training()


def seconds_per_agreement() -> float:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *command, "-m", "benchmarks.overheads", "agreement"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def seconds_per_line() -> float:
    """Of a line with six figures, to an offline wandb run."""
    names = ("epoch", "loss", "grad_norm", "learning_rate", "examples_per_second", "padding")
    with tempfile.TemporaryDirectory() as folder:
        trackers = Trackers(Accelerator(cpu=True, log_with=["wandb"]))
        trackers.start(
            ["wandb"],
            "benchmark",
            {},
            folder=Path(folder),
            metrics=[],
            lines=[],
            earlier=[],
            wandb_options={"mode": "offline"},
        )
        started = time.perf_counter()
        for update in range(1, NUM_CALLS + 1):
            trackers.log({"update": update, **dict.fromkeys(names, 1 / update)})
        seconds = (time.perf_counter() - started) / NUM_CALLS
        trackers.finish()
    return seconds


def main() -> None:
    if sys.argv[1:] == ["agreement"]:
        agreement()
        return
    update, asking, line = seconds_per_update(), seconds_per_agreement(), seconds_per_line()
    print(f"an update of the demo: {update * 1e3:.1f} ms")
    print(f"an agreement of two processes: {asking * 1e3:.2f} ms, {asking / update:.2%}")
    share = line / LOGGING_STEPS / update
    print(f"a line to wandb, offline: {line * 1e3:.2f} ms, {share:.2%} with one in {LOGGING_STEPS}")


if __name__ == "__main__":
    main()
