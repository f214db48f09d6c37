"""Checkpoints: what training computed, and nothing that follows from the configuration.

A checkpoint is a folder that is complete or does not exist: it is written next to its place,
flushed to disk, described by a manifest (size and SHA-256 of each file), then renamed. Loading one
executes nothing: it holds safetensors and JSON, whatever the number of processes and however the
weights were sharded.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib.backends import deepspeed, fsdp
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
from lib.checkpoints.run_folder import METRICS_FILE
from lib.distributed.collectives import on_all_processes, on_main_process
from lib.errors import InputError

STATE_FILE = "training_state.json"
MOMENTS_FILE = "optimizer.safetensors"
BEST_FILE = "best_model.safetensors"

# Weights by name, and moments by weight.
Tensors = tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]


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

    Args:
        folder: the output folder.
        identity: what the run is a function of: its configuration, and the content of its data.
        objects: what else to save, by name; None is skipped.
        keep: how many of the newest checkpoints to keep, besides the best; None keeps all.
        updates_per_epoch: to record the epoch of an update.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objects: Mapping[str, Stateful | None],
        keep: int | None,
        updates_per_epoch: int,
    ) -> None:
        self.folder = folder
        self.identity = identity
        self.keep = keep
        self.updates_per_epoch = updates_per_epoch
        self.accelerator = accelerator
        self.by_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        self.model = accelerator.unwrap_model(model, keep_torch_compile=False)
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.objects = {name: item for name, item in objects.items() if item is not None}
        if deepspeed.scales_loss(accelerator):
            self.objects["deepspeed_scaler"] = deepspeed.LossScale(self.optimizer)
        self.saved: TrainingState | None = None

    def save(self, name: str, state: TrainingState) -> None:
        """Write a checkpoint and prune older ones, unless this state is already on the disk.

        All processes call this.

        Raises:
            InputError: on all processes, if it cannot be written; earlier checkpoints stay.
        """
        if state == self.saved:
            return
        path = self.folder / name
        contents = {
            **dataclasses.asdict(state),
            "objects": {name: item.state_dict() for name, item in self.objects.items()},
        }
        tensors = self._tensors()
        try:
            on_main_process(self.accelerator, partial(_make_room, path))
            on_all_processes(self.accelerator, partial(self._write, path, tensors))
            on_main_process(self.accelerator, partial(self._complete, path, state, contents))
        finally:
            if self.accelerator.is_main_process:
                remove(beside(path))
        self.saved = dataclasses.replace(state)

    def _write(self, path: Path, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        with writing(path):
            for file, parts in tensors.items():
                save_file(parts, beside(path) / file)

    def _complete(self, path: Path, state: TrainingState, contents: Mapping[str, Any]) -> None:
        new = beside(path)
        with writing(path):
            write_json(new / STATE_FILE, contents)
            if state.best_update:
                link(self.folder / WEIGHTS_FILE, new / BEST_FILE)
            (new / METRICS_FILE).write_bytes((self.folder / METRICS_FILE).read_bytes())
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

    def resume(self, source: Path) -> TrainingState:
        """Load a verified checkpoint into the model, the optimizer and the objects.

        Raises:
            InputError: on all processes, if it is of another model.
        """
        # The main process alone reads what the others get in shards.
        read_on = on_main_process if self.sharded else on_all_processes
        tensors = read_on(self.accelerator, partial(self._read_tensors, source)) or ({}, {})
        state = on_all_processes(self.accelerator, partial(self._load, source, tensors))
        if self.sharded:
            fsdp.scatter(self.model, self.optimizer, *tensors)
        return state

    def _load(self, source: Path, tensors: Tensors) -> TrainingState:
        with _as_input_error(source):
            contents = json.loads((source / STATE_FILE).read_text(encoding="utf-8"))
            objects = contents.pop("objects")
            state = TrainingState(**contents)
            if not self.sharded:
                self._load_tensors(*tensors)
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

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """Weights and moments as the files of a checkpoint; empty except on the main process."""
        if self.sharded:
            weights, moments = fsdp.gather(self.model, self.optimizer)
        elif self.by_deepspeed:
            weights = deepspeed.whole_weights(self.model)
            moments = deepspeed.whole_moments(self.model, self.optimizer)
        elif self.accelerator.is_main_process:
            weights, moments = self.model.state_dict(), self._moments()
        if not self.accelerator.is_main_process:
            return {}
        return {
            WEIGHTS_FILE: _separate(weights),
            MOMENTS_FILE: _separate(moments),
        }

    def _moments(self) -> dict[str, Tensor]:
        """The optimizer's tensors as `<parameter>.<moment>`.

        Learning rates, which its own state dict adds, follow from the configuration.
        """
        names = {weight: name for name, weight in self.model.named_parameters()}
        return {
            f"{names[weight]}.{moment}": value
            for weight, moments in self.optimizer.state.items()
            for moment, value in moments.items()
        }

    def _read_tensors(self, source: Path) -> Tensors:
        """Read the weights and moments, and check their names and shapes against the model."""
        with _as_input_error(source):
            weights, saved = load_file(source / WEIGHTS_FILE), load_file(source / MOMENTS_FILE)
            moments: dict[str, dict[str, Tensor]] = {}
            for name, value in saved.items():
                weight, _, moment = name.rpartition(".")
                moments.setdefault(weight, {})[moment] = value
            expected = {name: value.shape for name, value in self.model.state_dict().items()}
            found = {name: value.shape for name, value in weights.items()}
            other = {name for name, _ in expected.items() ^ found.items()}
            for name, values in moments.items():
                if any(value.ndim and value.shape != found.get(name) for value in values.values()):
                    other.add(name)
            if other:
                raise ValueError(f"it is of another model, by {', '.join(sorted(other))}")
        return weights, moments

    def _load_tensors(
        self, weights: dict[str, Tensor], moments: dict[str, dict[str, Tensor]]
    ) -> None:
        if self.by_deepspeed:
            deepspeed.load(self.model, self.optimizer, weights, moments)
            return
        self.model.load_state_dict(weights)
        names = {weight: name for name, weight in self.model.named_parameters()}
        order = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        state = self.optimizer.state_dict()
        state["state"] = {
            index: moments[names[weight]]
            for index, weight in enumerate(order)
            if names[weight] in moments  # the others never had a gradient
        }
        self.optimizer.load_state_dict(state)

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


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU; those that share memory, as tied embeddings do, as copies."""
    separate: dict[str, Tensor] = {}
    seen = set()
    for name, value in tensors.items():
        here = value.cpu()  # first: XLA tensors have no storage to ask for
        place = here.untyped_storage().data_ptr()
        separate[name] = here.clone() if place in seen else here.contiguous()
        seen.add(place)
    return separate


def _make_room(path: Path) -> None:
    if path.exists() and not (path / manifest.MANIFEST_FILE).exists():
        raise InputError(f"{path} is in the way, and not a checkpoint: move it elsewhere")
    with writing(path):
        remove(beside(path))
        beside(path).mkdir()
