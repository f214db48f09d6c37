"""Checkpoints: what training computed, and nothing that follows from the configuration.

A checkpoint is a folder that is complete or does not exist: it is written next to its place,
flushed to disk, described by a manifest (size and SHA-256 of each file), then renamed. Loading one
executes nothing: it holds safetensors and JSON, whatever the number of processes and however the
weights were sharded.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib.backends import deepspeed, devices
from lib.checkpoints import manifest
from lib.checkpoints.atomic import (
    beside,
    discard,
    link,
    move_into_place,
    remove,
    write_json,
    writing,
)
from lib.checkpoints.best_model import WEIGHTS_FILE
from lib.checkpoints.run_folder import METRICS_FILE, RunFolder
from lib.checkpoints.tensors import (
    by_weight,
    copy_into,
    gather_moments,
    gather_weights,
    load_tensors,
    separate,
)
from lib.distributed.collectives import on_all_processes, on_main_process
from lib.distributed.stop_signal import StopSignal
from lib.errors import InputError

STATE_FILE = "training_state.json"
MOMENTS_FILE = "optimizer.safetensors"
BEST_FILE = "best_model.safetensors"


@dataclasses.dataclass
class TrainingState:
    """What a run has computed besides weights and moments.

    Attributes:
        update: updates done.
        evaluated: the last update after which the model was evaluated.
        best_score: of the metric that chooses the best model, at `best_update`.
        num_worse: evaluations since then.
    """

    update: int = 0
    evaluated: int = 0
    best_score: float | None = None
    best_update: int = 0
    num_worse: int = 0

    def record(self, score: float, *, lower: bool) -> bool:
        """Record an evaluation after this update; return whether it is the best so far.

        Of equal scores the first is the best; with `lower`, lower ones are better.
        """
        self.evaluated = self.update
        best = self.best_score
        if best is None or (score < best if lower else score > best):
            self.best_score, self.best_update, self.num_worse = score, self.update, 0
            return True
        self.num_worse += 1
        return False


class Stateful(Protocol):
    """An object that checkpoints keep; its state is what JSON can hold.

    `state_dict` is called on all processes, and may communicate.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Checkpoints:
    """Saves what a run has computed, and resumes from it.

    Where training leaves a core idle and there is memory for a copy, it waits for the copy only,
    which a thread of the main process writes. At most one checkpoint is being written.

    Args:
        folder: the output folder.
        identity: what the run is a function of: its configuration, and the content of its data.
        objects: what else to save, by name; None is skipped.
        keep: how many of the newest checkpoints to keep, besides the best; None keeps all.
        updates_per_epoch: to record the epoch of an update.
        stop: learns of a failure to write while training goes on.
    """

    def __init__(
        self,
        folder: RunFolder,
        identity: Mapping[str, Any],
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objects: Mapping[str, Stateful | None],
        keep: int | None,
        updates_per_epoch: int,
        stop: StopSignal,
    ) -> None:
        self.run_folder = folder
        self.folder = folder.path
        self.stop = stop
        self.identity = identity
        self.keep = keep
        self.updates_per_epoch = updates_per_epoch
        self.accelerator = accelerator
        self.model = accelerator.unwrap_model(model, keep_torch_compile=False)
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.objects = {name: item for name, item in objects.items() if item is not None}
        if deepspeed.scales_loss(accelerator):
            self.objects["deepspeed_scaler"] = deepspeed.LossScale(self.optimizer)
        self.saved: TrainingState | None = None
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.buffers: dict[str, dict[str, Tensor]] = {WEIGHTS_FILE: {}, MOMENTS_FILE: {}}
        self.said_why_waiting = False

    def save(self, name: str, state: TrainingState, *, wait: bool = False) -> None:
        """Write a checkpoint and prune older ones, unless this state is already on the disk.

        All processes call this. It waits for the checkpoint before; for this one with `wait`, or
        where it cannot be written beside the training.

        Raises:
            InputError: on all processes, if one of the two cannot be written; earlier checkpoints
                stay. If this one fails later, `stop.check`, `wait` or the next `save` raises it.
        """
        if wait or state != self.saved:
            self.wait()
        if state == self.saved:
            return
        contents = {
            **dataclasses.asdict(state),
            "objects": {name: item.state_dict() for name, item in self.objects.items()},
        }
        files = {
            WEIGHTS_FILE: gather_weights(self.accelerator, self.model),
            MOMENTS_FILE: gather_moments(self.accelerator, self.model, self.optimizer),
        }
        self.saved = dataclasses.replace(state)
        begin = partial(self._begin, self.folder / name, self.saved, contents, files, wait)
        on_main_process(self.accelerator, begin)

    def wait(self) -> None:
        """Wait until the last checkpoint is complete. All processes call this.

        Raises:
            InputError: on all processes, if it could not be written.
        """
        pending, self.run_folder.pending = self.run_folder.pending, None
        on_main_process(self.accelerator, lambda: pending.result() if pending else None)

    def _begin(
        self,
        path: Path,
        state: TrainingState,
        contents: Mapping[str, Any],
        files: Mapping[str, Mapping[str, Tensor]],
        wait: bool,
    ) -> None:
        """Write a checkpoint, or only what training is about to change, and copy the tensors."""
        _make_room(path)
        try:
            with writing(path):
                write_json(beside(path) / STATE_FILE, contents)
                if state.best_update:
                    link(self.folder / WEIGHTS_FILE, beside(path) / BEST_FILE)
                lines = (self.folder / METRICS_FILE).read_bytes()
                (beside(path) / METRICS_FILE).write_bytes(lines)
            if wait or not self._has_room(files):
                self._complete(path, state, {name: separate(files[name]) for name in files})
                return
            copies = {name: copy_into(self.buffers[name], files[name]) for name in files}
        except BaseException:
            remove(beside(path))
            raise
        self.run_folder.pending = self.thread.submit(self._complete, path, state, copies)
        self.run_folder.pending.add_done_callback(self._report)

    def _has_room(self, files: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """True where a copy can be written beside the training; says once if memory is short."""
        if not devices.leaves_a_core(self.accelerator):
            return False
        needed = sum(
            value.nbytes
            for file, tensors in files.items()
            for name, value in tensors.items()
            if name not in self.buffers[file]
        )
        free = devices.free_memory() if needed else 0
        if needed <= free / 2:  # the other half is for the training
            return True
        if not self.said_why_waiting:
            self.said_why_waiting = True
            print(
                f"training waits while checkpoints are written: a copy of {needed / 1e9:.1f} GB "
                f"would take more than half of the {free / 1e9:.1f} GB of memory that are free",
                file=sys.stderr,
            )
        return False

    def _report(self, written: Future[None]) -> None:
        if error := written.exception():
            self.stop.fail(error)

    def _complete(
        self, path: Path, state: TrainingState, files: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Write the tensors and the manifest, and give the checkpoint its name."""
        new = beside(path)
        try:
            with writing(path):
                for name, tensors in files.items():
                    save_file(dict(tensors), new / name)
                content = {
                    "update": state.update,
                    "epoch": state.update / self.updates_per_epoch,
                    "best_update": state.best_update,
                    "num_processes": self.accelerator.num_processes,
                    "run": dict(self.identity),
                    "fingerprint": manifest.digest(self.identity),
                }
                manifest.write(new, content)
                move_into_place(path)
                self._prune(path, state)
        finally:
            remove(new)

    def resume(self, source: Path) -> TrainingState:
        """Load a verified checkpoint into the model, the optimizer and the objects.

        Raises:
            InputError: on all processes, if it is of another model.
        """
        # Under FSDP the main process alone reads what the others get in shards.
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        read_on = on_main_process if sharded else on_all_processes
        tensors = read_on(self.accelerator, partial(self._read_tensors, source)) or ({}, {})
        state = on_all_processes(self.accelerator, partial(self._load_objects, source))
        load_tensors(self.accelerator, self.model, self.optimizer, *tensors)
        return state

    def _load_objects(self, source: Path) -> TrainingState:
        with _as_input_error(source):
            contents = json.loads((source / STATE_FILE).read_text(encoding="utf-8"))
            objects = contents.pop("objects")
            state = TrainingState(**contents)
            for line in (source / METRICS_FILE).read_bytes().splitlines():
                json.loads(line)
            if state.best_update:
                with safe_open(source / BEST_FILE, framework="pt"):
                    pass  # `BestModel.restore` takes it as it is
            missing = ", ".join(self.objects.keys() - objects.keys())
            if missing:
                raise ValueError(f"it has no {missing}: resume with the backend that wrote it")
            for name, item in self.objects.items():
                item.load_state_dict(objects[name])
        if source.resolve().parent == self.folder.resolve():
            self.saved = dataclasses.replace(state)
        return state

    def _read_tensors(self, source: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Read weights and moments, and check their names and shapes against the model."""
        with _as_input_error(source):
            weights = load_file(source / WEIGHTS_FILE)
            moments = by_weight(load_file(source / MOMENTS_FILE))
            expected = {name: value.shape for name, value in self.model.state_dict().items()}
            found = {name: value.shape for name, value in weights.items()}
            other = {name for name, _ in expected.items() ^ found.items()}
            for name, values in moments.items():
                if any(value.ndim and value.shape != found.get(name) for value in values.values()):
                    other.add(name)
            if other:
                raise ValueError(f"it is of another model, by {', '.join(sorted(other))}")
        return weights, moments

    def _prune(self, written: Path, state: TrainingState) -> None:
        """Remove older checkpoints but the best, now that a newer one is in place.

        Checkpoints of later updates stay: this run overwrites them when it gets there.
        """
        if self.keep is None:
            return
        older = [
            (content["update"], path)
            for path, content in manifest.owned(self.folder).items()
            if content["update"] <= state.update and path != written
        ]
        kept = self.keep - 1
        for update, path in sorted(older)[: max(0, len(older) - kept)]:
            if update != state.best_update:
                discard(path)


@contextlib.contextmanager
def _as_input_error(source: Path) -> Iterator[None]:
    """Raise what goes wrong with the content of a checkpoint as one line."""
    try:
        yield
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as bad:
        reason = " ".join(str(bad).split())[:200]
        raise InputError(f"checkpoint {source} does not fit this run: {reason}") from bad


def _make_room(path: Path) -> None:
    if path.exists() and not (path / manifest.MANIFEST_FILE).exists():
        raise InputError(f"{path} is in the way, and not a checkpoint: move it elsewhere")
    with writing(path):
        remove(beside(path))
        beside(path).mkdir()
