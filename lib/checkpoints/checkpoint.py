"""Checkpoints: what training computed, and nothing that follows from the configuration.

A checkpoint is a folder that is complete or does not exist: it is written beside, flushed to the
disk, described by a manifest (size and SHA-256 of each file), and then renamed. Loading one
executes nothing: it holds safetensors and JSON, whatever the number of processes and however the
weights were sharded. Only under DeepSpeed are weights and moments in files of DeepSpeed's own.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

from lib.checkpoints.best_model import WEIGHTS_FILE, link
from lib.checkpoints.output import beside, discard, move_into_place, remove, write_json, writing
from lib.distributed.collectives import on_main_process, together
from lib.errors import InputError
from lib.tracking.run_log import METRICS_FILE, Speed
from lib.training.meter import Monitor

MANIFEST_FILE = "manifest.json"
STATE_FILE = "training_state.json"
MOMENTS_FILE = "optimizer.safetensors"
BEST_FILE = "best_model.safetensors"
FORMAT = 2

# Whole tensors under the names of the parameters, on the main process: the same for one process,
# for replicas (DDP) and for shards (FSDP), so that a run may go on with any of them.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclasses.dataclass
class TrainingState:
    """What a run has computed besides weights and moments.

    `update` counts the updates done, `evaluated` is the last one after which the model was
    evaluated. `best_score` is that of the metric that chooses, at `best_update`; `num_worse`
    counts the evaluations since then.
    """

    update: int = 0
    evaluated: int = 0
    best_score: float | None = None
    best_update: int = 0
    num_worse: int = 0

    def is_best(self, score: float, *, lower: bool) -> bool:
        """Take note of an evaluation after this update; whether its score is the best so far.

        Of equal scores the first is the best.
        """
        self.evaluated = self.update
        best = self.best_score
        if best is None or (score < best if lower else score > best):
            self.best_score, self.best_update, self.num_worse = score, self.update, 0
            return True
        self.num_worse += 1
        return False


def name_at(
    update: int, num_updates: int, updates_per_epoch: int, checkpointing_steps: str | None
) -> str | None:
    """The name of the checkpoint that is due after `update` updates; None if none is.

    `epoch_{i}` after each epoch and at the end, or `step_{n}` every so many updates.
    """
    if checkpointing_steps in (None, "epoch"):
        due = update % updates_per_epoch == 0 or update == num_updates
        return f"epoch_{(update - 1) // updates_per_epoch}" if due else None
    return f"step_{update}" if update % int(checkpointing_steps) == 0 else None


class Checkpoints:
    """Saves what a run has computed, and loads it.

    Args:
        folder: the output folder.
        run: what the run is a function of: its configuration, and the content of its data.
        updates_per_epoch: to tell the epoch of an update.
        keep: how many of the newest checkpoints are kept, besides the best; None keeps all.
    """

    def __init__(
        self,
        folder: Path,
        run: Mapping[str, Any],
        *,
        updates_per_epoch: int,
        keep: int | None,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        monitor: Monitor,
        speed: Speed,
    ) -> None:
        self.folder = folder
        self.run = run
        self.updates_per_epoch = updates_per_epoch
        self.keep = keep
        self.accelerator = accelerator
        self.by_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.model = accelerator.unwrap_model(model, keep_torch_compile=False)
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.monitor = monitor
        self.speed = speed
        self.saved: TrainingState | None = None

    def save(self, name: str, state: TrainingState) -> None:
        """Write a checkpoint, unless one of this state was written or loaded; prune older ones.

        All processes call this.

        Raises:
            InputError: on all processes, if it cannot be written; those before it stay.
        """
        if state == self.saved:
            return
        path = self.folder / name
        contents = {
            **dataclasses.asdict(state),
            "monitor": self.monitor.state(),
            "speed": self.speed.state(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        tensors = {} if self.by_deepspeed else self._tensors()

        def prepare() -> None:
            if path.exists() and not (path / MANIFEST_FILE).exists():
                raise InputError(f"{path} is in the way, and not a checkpoint: move it elsewhere")
            with writing(path):
                remove(beside(path))
                beside(path).mkdir()

        def write() -> None:
            with writing(path):
                if self.by_deepspeed:
                    self.accelerator.save_state(str(beside(path)))
                for file, parts in tensors.items():
                    save_file(parts, beside(path) / file)

        def complete() -> None:
            with writing(path):
                for file in beside(path).glob("random_states_*.pkl"):
                    file.unlink()  # DeepSpeed's; generators are seeded anew for each micro-batch
                write_json(beside(path) / STATE_FILE, contents)
                if state.best_update:
                    link(self.folder / WEIGHTS_FILE, beside(path) / BEST_FILE)
                lines = (self.folder / METRICS_FILE).read_bytes()
                (beside(path) / METRICS_FILE).write_bytes(lines)
                manifest = {
                    "format": FORMAT,
                    "update": state.update,
                    "epoch": state.update / self.updates_per_epoch,
                    "best_update": state.best_update,
                    "num_processes": self.accelerator.num_processes,
                    "run": dict(self.run),
                    "fingerprint": _digest(self.run),
                    "files": _describe(beside(path)),
                }
                write_json(
                    beside(path) / MANIFEST_FILE, {**manifest, "checksum": _digest(manifest)}
                )
                move_into_place(path)
                self._prune(path, state)

        try:
            on_main_process(self.accelerator, prepare)
            together(self.accelerator, write)
            on_main_process(self.accelerator, complete)
        finally:
            if self.accelerator.is_main_process:
                remove(beside(path))
        self.saved = dataclasses.replace(state)

    def load(self, source: Path) -> TrainingState:
        """Load a checkpoint that was verified into the model, the optimizer and the monitor.

        Raises:
            InputError: it is of another model.
        """
        try:
            contents = json.loads((source / STATE_FILE).read_text(encoding="utf-8"))
            monitored, speed, scaler = map(contents.pop, ("monitor", "speed", "scaler"))
            state = TrainingState(**contents)
            if self.by_deepspeed:
                self.accelerator.load_state(str(source))
                # It counts micro-batches, and this run may accumulate others.
                self.accelerator.step = 0
            else:
                self._load_tensors(source)
            for line in (source / METRICS_FILE).read_bytes().splitlines():
                json.loads(line)
            if state.best_update:
                with safe_open(source / BEST_FILE, framework="pt"):
                    pass  # `export.restore` will take it as it is
        except (OSError, LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as bad:
            reason = " ".join(str(bad).split())[:200]
            raise InputError(f"checkpoint {source} does not fit this run: {reason}") from bad
        self.monitor.load(monitored)
        self.speed.load(speed)
        if self.accelerator.scaler is not None and scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        if source.resolve().parent == self.folder.resolve():
            self.saved = dataclasses.replace(state)
        return state

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """Weights and moments as the files of a checkpoint; empty on other than the main process.

        The learning rates and the like, which the optimizer would save too, follow from the
        configuration.
        """
        whole = get_state_dict(self.model, self.optimizer, options=WHOLE)
        weights, moments = cast(tuple[dict[str, Any], dict[str, Any]], whole)
        if not self.accelerator.is_main_process:
            return {}
        return {
            WEIGHTS_FILE: {name: value.contiguous() for name, value in weights.items()},
            MOMENTS_FILE: {
                f"{name}.{moment}": value.contiguous()
                for name, values in moments["state"].items()
                for moment, value in values.items()
            },
        }

    def _load_tensors(self, source: Path) -> None:
        options = dataclasses.replace(WHOLE, cpu_offload=False)
        moments: dict[str, Any] = get_optimizer_state_dict(
            self.model, self.optimizer, options=options
        )
        saved = load_file(source / MOMENTS_FILE)
        # PyTorch makes some up for weights that never had a gradient, and insists on them here.
        made_up = {
            name
            for name, values in moments["state"].items()
            if not any(f"{name}.{moment}" in saved for moment in values)
        }
        moments["state"] = {
            name: values
            if name in made_up
            else {moment: saved.pop(f"{name}.{moment}") for moment in values}
            for name, values in moments["state"].items()
        }
        if saved:
            raise ValueError(f"it has moments of weights that are not here: {', '.join(saved)}")
        weights: dict[str, Any] = load_file(source / WEIGHTS_FILE)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=weights,
            optim_state_dict=moments,
            options=options,
        )
        for name, weight in self.model.named_parameters():
            if name in made_up:
                del self.optimizer.state[weight]

    def _prune(self, written: Path, state: TrainingState) -> None:
        """Remove older checkpoints but the best, now that a newer one is in place.

        Those of later updates stay: the run did not go on from them, as they are damaged or were
        not asked for, and will come to replace them.
        """
        if self.keep is None:
            return
        older = [
            (manifest["update"], path)
            for path, manifest in owned(self.folder).items()
            if manifest["update"] <= state.update and path != written
        ]
        kept = self.keep - 1
        for update, path in sorted(older)[: max(0, len(older) - kept)]:
            if update != state.best_update:
                discard(path)


def owned(folder: Path) -> dict[Path, dict[str, Any]]:
    """The checkpoints in an output folder that this script wrote, with their manifests; unverified.

    A folder whose manifest cannot be read may be anybody's, and is not among them.
    """
    found = {}
    for path in _candidates(folder):
        with contextlib.suppress(InputError):
            found[path] = _manifest(path)
    return found


def _candidates(folder: Path) -> list[Path]:
    """Folders that are named as checkpoints are."""
    return [
        path
        for path in sorted(folder.glob("*_*"))
        if re.fullmatch(r"(step|epoch)_\d+", path.name) and path.is_dir()
    ]


def newest(folder: Path) -> tuple[tuple[Path, dict[str, Any]] | None, list[str]]:
    """The newest good checkpoint in an output folder with its manifest, and why not a newer one.

    A folder whose manifest cannot be read has no known age, and is always told of.
    """
    candidates = []
    remarks = []
    for path in _candidates(folder):
        try:
            candidates.append((_manifest(path)["update"], path))
        except InputError as error:
            remarks.append(str(error))
    for _, path in sorted(candidates, reverse=True):
        try:
            return (path, verify(path)), remarks
        except InputError as error:
            remarks.append(str(error))
    return None, remarks


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, all of whose files are as they were written.

    Raises:
        InputError: a file is missing, truncated or altered; the message names it.
    """
    manifest = _manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != expected["size"]:
                raise InputError(
                    f"checkpoint {path} is damaged: {name} has {size} bytes instead of "
                    f"{expected['size']}"
                )
            if _sha256(file) != expected["sha256"]:
                raise InputError(
                    f"checkpoint {path} is damaged: {name} is not what was written (SHA-256)"
                )
        except FileNotFoundError as error:
            raise InputError(f"checkpoint {path} is damaged: {name} is missing") from error
        except OSError as error:
            raise InputError(f"checkpoint {path}: {name} cannot be read: {error}") from error
    return manifest


def _manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        checksum = content.pop("checksum")
    except FileNotFoundError as error:
        raise InputError(f"{path} is no checkpoint of this script: no {MANIFEST_FILE}") from error
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be read: {error}") from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"checkpoint {path} is damaged: {MANIFEST_FILE} is altered") from error
    if checksum != _digest(content):
        raise InputError(f"checkpoint {path} is damaged: {MANIFEST_FILE} is altered")
    if content["format"] != FORMAT:
        raise InputError(
            f"checkpoint {path} has format {content['format']}, this version reads {FORMAT}: go "
            "on with the version that wrote it"
        )
    assert isinstance(content, dict)
    return content


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
