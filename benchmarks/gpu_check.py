"""Check on one GPU what the tests can only check on CPUs, in less than eight minutes.

    python -m benchmarks.gpu_check                   prints a table; exit status 1 if a check failed
    python -m benchmarks.gpu_check --json gpu.json   also writes it as JSON
    python -m benchmarks.gpu_check --toy             fewer updates, as on a machine without a GPU

Each check starts `train_mrpc.py` on the demo, through `accelerate launch` and the files that are
shipped, without the network. Where runs have to agree but for rounding, the model has no dropout.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lib.demo.corpus import MODEL_DIR

ROOT = Path(__file__).parent.parent
SCRIPT, LIB = ROOT / "train_mrpc.py", ROOT / "lib"
SECONDS = 150  # for one run at most

# The gradients of the demo fit into fp16 from a loss scale of some 2**16 on.
OVERFLOWING_SCALE = 2.0**20
# The first updates allocate and set up what later ones use.
WARM_UP_UPDATES = 3
# Padded to one of four lengths, in training and in evaluation: `compiled_multiple`.
MOST_GRAPHS = 8


class Failed(Exception):
    """A check that does not hold; the message says what was found."""


@dataclasses.dataclass
class Bench:
    """Starts runs, each once: several checks compare with the same.

    Args:
        folder: for what the runs write.
        toy: train for few updates.
    """

    folder: Path
    toy: bool
    finished: dict[str, Path] = dataclasses.field(default_factory=dict)

    @property
    def num_updates(self) -> int:
        """Updates of a run; it evaluates after each quarter of them."""
        return 12 if self.toy else 60

    def flags(self, folder: Path, *, dropout: bool) -> list[str]:
        """Return the flags of a run into `folder`."""
        flags = [
            "--demo",
            "--report_to=none",
            "--adam_epsilon=1e-5",
            f"--max_train_steps={self.num_updates}",
            f"--eval_every={self.num_updates // 4}",
            f"--logging_steps={self.num_updates // 6}",
            f"--output_dir={folder}",
        ]
        if not dropout:
            flags.append(f"--model_name_or_path={self.model_without_dropout()}")
        if self.toy:
            flags += ["--max_train_samples=64", "--max_eval_samples=16", "--max_predict_samples=4"]
        return flags

    def model_without_dropout(self) -> Path:
        """Return the demo's model with dropout 0 in its config.json."""
        model = self.folder / "model"
        if not model.exists():
            shutil.copytree(MODEL_DIR, model)
            path = model / "config.json"
            names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
            path.write_text(json.dumps(json.loads(path.read_text()) | dict.fromkeys(names, 0.0)))
        return model

    def run(
        self,
        name: str,
        *more: str,
        file: str = "single_gpu",
        options: Sequence[str] = (),
        precision: str = "no",
        dropout: bool = False,
        into: str | None = None,
        **watched: Any,
    ) -> Path:
        """Run the script once, and return its output folder.

        Args:
            more: flags that override the others.
            file, options: for `accelerate launch`.
            into: the name of an earlier run, which is to be resumed.
            watched: for `watch`.

        Raises:
            Failed: it did not finish; or it did, and was to be killed.
        """
        if name in self.finished:
            return self.finished[name]
        folder = self.folder / (into or name)
        flags = [*self.flags(folder, dropout=dropout), *more]
        watched["report"] = str(self.folder / f"{name}.json")
        launcher = [
            "accelerate.commands.launch",
            f"--config_file={ROOT / 'accelerate_configs' / f'{file}.yaml'}",
            f"--mixed_precision={precision}",
            *options,
        ]
        status, printed = start(
            [*launcher, "-m", __spec__.name, "--watch", json.dumps(watched), *flags]
        )
        if (status == 0) == ("kill_after" in watched):
            lines = [line for line in printed.splitlines() if "rror" in line] or [f"exit {status}"]
            raise Failed(f"{name}: {lines[0].strip()[:200]}")
        self.finished[name] = folder
        return folder

    def watched(self, name: str) -> dict[str, Any]:
        """Return what `watch` saw of a run."""
        return dict(json.loads((self.folder / f"{name}.json").read_text()))


def start(arguments: Sequence[str], seconds: float = SECONDS) -> tuple[int, str]:
    """Run a module of Python; return its exit status and what it printed.

    Raises:
        Failed: it took longer than `seconds`.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        # The last makes cuBLAS deterministic where PyTorch is told to be.
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Failed(f"not finished after {seconds:.0f} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the launcher's workers too
    return process.returncode, printed


# What happens in a run


def watch(settings: dict[str, Any], flags: Sequence[str]) -> None:
    """Run the script in this process, as `python train_mrpc.py` does, and report what it did.

    Args:
        settings: `report`, the file to write; `count_syncs`; `init_scale` of the gradient scaler;
            `deterministic` kernels; `kill_after` so many updates; `gloo` between GPUs.
    """
    from torch._dynamo.utils import counters

    from lib.training.meter import Meter

    seen: dict[str, Any] = {"updates": 0, "graphs": []}
    seen |= {"syncs": collections.Counter(), "syncs_in_model": collections.Counter()}
    count_update = Meter.count_update

    def counted(meter: Meter, *counts: int) -> None:
        count_update(meter, *counts)
        seen["updates"] += 1
        seen["graphs"].append(counters["stats"]["unique_graphs"])
        if seen["updates"] == settings.get("kill_after"):
            os.kill(os.getpid(), signal.SIGKILL)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(Meter, "count_update", counted))
        if settings.get("count_syncs"):
            patches.enter_context(counting_syncs(seen))
        if "init_scale" in settings:
            from accelerate.utils import get_grad_scaler

            scaler = functools.partial(get_grad_scaler, init_scale=settings["init_scale"])
            patches.enter_context(mock.patch("accelerate.accelerator.get_grad_scaler", scaler))
        if settings.get("gloo"):
            # NCCL refuses two ranks on one GPU; and DDP would want a GPU for each local rank.
            os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
            backend = mock.Mock(return_value="cpu:gloo,cuda:gloo")
            patches.enter_context(mock.patch("lib.distributed.process_group._backend", backend))
        # Strictly: where it may only warn, PyTorch's attention stays as it is.
        torch.use_deterministic_algorithms(bool(settings.get("deterministic")))
        run_script(flags)
    if os.environ.get("RANK", "0") == "0":
        Path(settings["report"]).write_text(json.dumps(seen))


def run_script(flags: Sequence[str]) -> None:
    sys.argv = [str(SCRIPT), *flags]
    runpy.run_path(str(SCRIPT), run_name="__main__")


@contextlib.contextmanager
def counting_syncs(seen: dict[str, Any]) -> Iterator[None]:
    """Count, by file and line, the operations for which the CPU waits for the GPU.

    From the start of an update to the next reading: `Meter.check` begins each, for a line of the
    log, an evaluation or a checkpoint. What happens in the model of transformers counts apart.
    PyTorch does not see copies from memory that is not pinned.
    """
    from lib.training.meter import Meter, Speed

    begin, check = Speed.start, Meter.check

    def armed(speed: Speed) -> None:
        begin(speed)
        if seen["updates"] >= WARM_UP_UPDATES:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def disarmed(meter: Meter) -> None:
        torch.cuda.set_sync_debug_mode("default")
        if sys._getframe(1).f_code.co_name == "guard_update":
            seen["syncs"]["Meter.guard_update checks each update"] += 1
        check(meter)

    def record(message: Warning | str, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):
            frames = [(Path(f.filename), f.lineno) for f in traceback.extract_stack()]
            in_model = [frame for frame in frames if "transformers" in frame[0].parts]
            ours = [frame for frame in frames if frame[0] == SCRIPT or LIB in frame[0].parents]
            kind = "syncs_in_model" if in_model else "syncs"
            path, line = ([(Path("elsewhere"), 0)] + (in_model or ours))[-1]
            seen[kind][f"{path.name}:{line}"] += 1

    with (
        warnings.catch_warnings(),
        mock.patch.object(Speed, "start", armed),
        mock.patch.object(Meter, "check", disarmed),
        mock.patch.object(warnings, "showwarning", record),
    ):
        yield
    torch.cuda.set_sync_debug_mode("default")


# The checks: each returns its figure, or raises Failed


def check_fp32(bench: Bench) -> str:
    """The loss falls."""
    folder = bench.run("fp32")
    return f"{falling(losses(folder))}, {speed(folder)}"


def check_precision(bench: Bench, precision: str) -> str:
    """The course of fp32, but for rounding."""
    folder = bench.run(precision, precision=precision, count_syncs=torch.cuda.is_available())
    difference = largest_difference(losses(folder), losses(bench.run("fp32")), at_most=0.02)
    return f"{falling(losses(folder))}, {difference:.1e} from fp32, {speed(folder)}"


def overflowing(bench: Bench, name: str, **watched: Any) -> Path:
    """An fp16 run whose first updates overflow, with a checkpoint after each quarter."""
    return bench.run(
        name,
        "--logging_steps=1",
        f"--checkpointing_steps={bench.num_updates // 4}",
        precision="fp16" if torch.cuda.is_available() else "no",
        dropout=True,
        deterministic=True,
        init_scale=OVERFLOWING_SCALE,
        **watched,
    )


def check_overflow(bench: Bench) -> str:
    """The scaler skips the updates that overflow, and training goes on."""
    folder = overflowing(bench, "overflow")
    skipped = [line["update"] for line in lines(folder) if line["grad_norm"] is None]
    if not 0 < len(skipped) <= bench.num_updates // 2:
        raise Failed(f"skipped updates: {skipped or 'none'}")
    scale = scaler_of(folder / f"step_{bench.num_updates}")["scale"]
    loss = losses(folder)[bench.num_updates]
    return (
        f"{len(skipped)} updates skipped, the last {skipped[-1]}; scale {scale:g}, loss {loss:.3f}"
    )


def check_kill(bench: Bench) -> str:
    """A run killed between two checkpoints resumes to the same bits, the scaler's state too."""
    whole = overflowing(bench, "overflow")
    kill_after = bench.num_updates * 5 // 8
    killed = overflowing(bench, "killed", kill_after=kill_after)
    reached = lines(killed)[-1]["update"]
    if reached != kill_after - 1:  # the line of the update itself comes after the kill
        raise Failed(f"it was to be killed after update {kill_after}, and stopped after {reached}")
    resumed = overflowing(bench, "resumed", into="killed")
    last = f"step_{bench.num_updates}"
    for file in ("model.safetensors", f"{last}/model.safetensors", f"{last}/optimizer.safetensors"):
        if (whole / file).read_bytes() != (resumed / file).read_bytes():
            raise Failed(f"{file} has other bits after a kill at update {kill_after}")
    if scaler_of(whole / last) != scaler_of(resumed / last):
        raise Failed(f"scaler {scaler_of(whole / last)}, resumed {scaler_of(resumed / last)}")
    scaler = "with the scaler" if scaler_of(whole / last) else "without a scaler"
    return f"killed after update {kill_after} of {bench.num_updates}: bits equal, {scaler}"


def check_syncs(bench: Bench, precision: str) -> str:
    """Nothing between two lines of the log makes the CPU wait for the GPU."""
    check_precision(bench, precision)
    seen = bench.watched(precision)
    counts = f"{sum(seen['syncs'].values())} in {seen['updates'] - WARM_UP_UPDATES} updates"
    if seen["syncs"]:
        raise Failed(f"{counts}: {listed(seen['syncs'])}")
    in_model = listed(seen["syncs_in_model"]) or "none"
    return f"{counts}; inside the model of transformers: {in_model}"


def listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} at {place}" for place, count in counts.items())


def check_compile(bench: Bench, mode: str) -> str:
    """Compiled, the same course, few graphs, and the dropout of a resumed run."""
    backend = "inductor" if torch.cuda.is_available() else "eager"
    options = [f"--dynamo_backend={backend}", f"--dynamo_mode={mode}"]
    folder = bench.run(f"compiled {mode}", options=options)
    difference = largest_difference(losses(folder), losses(bench.run("fp32")), at_most=1e-3)
    graphs = bench.watched(f"compiled {mode}")["graphs"]
    late = graphs[-1] - graphs[len(graphs) // 2]
    if not 0 < graphs[-1] <= MOST_GRAPHS or late:
        raise Failed(f"{graphs[-1]} graphs, {late} of them in the second half of the updates")

    half = bench.num_updates // 2
    whole = bench.run(
        f"dropout {mode}", f"--checkpointing_steps={half}", options=options, dropout=True
    )
    source = f"--resume_from_checkpoint={whole / f'step_{half}'}"
    resumed = losses(bench.run(f"resumed {mode}", source, options=options, dropout=True))
    other = largest_difference(resumed, losses(whole), at_most=1e-3)
    return (
        f"{difference:.1e} from eager, {graphs[-1]} graphs, {other:.1e} after a resume with "
        f"dropout, {speed(folder)}"
    )


def check_fsdp(bench: Bench) -> str:
    """FSDP2 with one rank takes the course of one process."""
    folder = bench.run("fsdp2", file="fsdp2", options=["--num_processes=1"])
    return same_as_one_process(bench, folder)


def check_two_ranks(bench: Bench) -> str:
    """Two ranks on one GPU take the course of one process."""
    folder = bench.run("two ranks", file="multi_gpu", options=["--num_processes=2"], gloo=True)
    return same_as_one_process(bench, folder)


def same_as_one_process(bench: Bench, folder: Path) -> str:
    difference = largest_difference(losses(folder), losses(bench.run("fp32")), at_most=1e-4)
    return f"{difference:.1e} from one process, {speed(folder)}"


# What a run leaves, read back


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl about training."""
    written = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, written) if "loss" in line]


def losses(folder: Path) -> dict[int, float]:
    return {line["update"]: line["loss"] for line in lines(folder)}


def largest_difference(one: dict[int, float], other: dict[int, float], *, at_most: float) -> float:
    """Return the largest difference between the losses of two runs.

    Raises:
        Failed: it is more than `at_most`, or they have other updates.
    """
    if one.keys() != other.keys():
        raise Failed(f"losses of updates {sorted(one)} and {sorted(other)}")
    difference = max(abs(one[update] - other[update]) for update in one)
    if not difference <= at_most:
        raise Failed(f"losses differ by {difference:.1e}, more than {at_most:.0e}")
    return difference


def falling(course: dict[int, float]) -> str:
    """Describe a loss that falls from the first third of the updates to the last."""
    values = list(course.values())
    third = len(values) // 3
    first, last = sum(values[:third]) / third, sum(values[-third:]) / third
    if not last < first:
        raise Failed(f"the loss goes from {first:.4f} to {last:.4f}")
    return f"loss {first:.3f} to {last:.3f}"


def speed(folder: Path) -> str:
    results = json.loads((folder / "all_results.json").read_text())
    return f"{results['train_examples_per_second']:.0f} examples/s"


def scaler_of(checkpoint: Path) -> dict[str, Any]:
    """Return the state of the gradient scaler; empty without one."""
    state = json.loads((checkpoint / "training_state.json").read_text())
    return dict(state["objects"].get("scaler", {}))


# The table

# By name: the check, and whether it needs a GPU.
CHECKS: dict[str, tuple[Callable[[Bench], str], bool]] = {
    "fp32": (check_fp32, False),
    "bf16": (functools.partial(check_precision, precision="bf16"), False),
    "fp16": (functools.partial(check_precision, precision="fp16"), True),
    "fp16, overflowing": (check_overflow, True),
    "killed and resumed": (check_kill, False),
    "host synchronizations, bf16": (functools.partial(check_syncs, precision="bf16"), True),
    "host synchronizations, fp16": (functools.partial(check_syncs, precision="fp16"), True),
    "torch.compile": (functools.partial(check_compile, mode="default"), False),
    "torch.compile, reduce-overhead": (
        functools.partial(check_compile, mode="reduce-overhead"),
        True,
    ),
    "FSDP2, one rank": (check_fsdp, True),
    "two ranks on one GPU, gloo": (check_two_ranks, True),
}


def result_of(name: str, bench: Bench) -> tuple[str, str]:
    """Return `passed`, `failed` or `not here`, and the figure or the reason."""
    check, needs_gpu = CHECKS[name]
    if needs_gpu and not torch.cuda.is_available():
        return "not here", "no GPU"
    try:
        return "passed", check(bench)
    except Failed as failure:
        return "failed", str(failure)


def main(flags: Sequence[str]) -> int:
    """Print the table, and return the exit status."""
    if flags[:1] == ["--watch"]:
        watch(json.loads(flags[1]), flags[2:])
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the table too")
    parser.add_argument("--toy", action="store_true", help="fewer updates, as without a GPU")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS, help="some checks")
    arguments = parser.parse_args(flags)
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{device}, torch {torch.__version__}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), toy=arguments.toy or not on_gpu)
        for name in arguments.only:
            started = time.perf_counter()
            result, figure = result_of(name, bench)
            seconds = time.perf_counter() - started
            print(f"{name:<32}{result:<10}{seconds:5.0f} s  {figure}", flush=True)
            rows.append({"what": name, "result": result, "figure": figure, "seconds": seconds})
    if arguments.json:
        table = {"device": device, "torch": torch.__version__, "rows": rows}
        arguments.json.write_text(json.dumps(table, indent=2) + "\n")
    return int(any(row["result"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
