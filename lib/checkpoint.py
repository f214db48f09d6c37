"""Checkpoints: what training computed, and nothing that follows from the configuration."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lib.errors import InputError
from lib.output import CONFIG_FILE, replacing, write_json, writing

STATE_FILE = "training_state.json"
WEIGHTS_FILE = "model.safetensors"
BEST_FILE = "best_model.safetensors"


@dataclasses.dataclass
class TrainingState:
    """What a run has computed besides weights and moments.

    `update` counts the updates done. `best_score` is that of the metric that chooses, at
    `best_update`; `num_worse` counts the evaluations since then.
    """

    update: int = 0
    best_score: float | None = None
    best_update: int = 0
    num_worse: int = 0

    def is_best(self, score: float, *, lower: bool) -> bool:
        """Take note of an evaluation after this update; whether its score is the best so far.

        Of equal scores the first is the best.
        """
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
    if checkpointing_steps == "epoch":
        due = update % updates_per_epoch == 0 or update == num_updates
        return f"epoch_{(update - 1) // updates_per_epoch}" if due else None
    if checkpointing_steps is not None and update % int(checkpointing_steps) == 0:
        return f"step_{update}"
    return None


def save_checkpoint(folder: Path, accelerator: Accelerator, state: TrainingState) -> None:
    """Write weights, moments, state and the best model so far; complete, or it does not exist.

    All processes call this: sharded weights are written by all of them. The best model is the one
    that `export` left in the parent folder.
    """
    with (
        replacing(folder, main=accelerator.is_main_process) as beside,
        writing(folder),
    ):
        if accelerator.is_main_process:
            beside.mkdir()
        accelerator.wait_for_everyone()
        accelerator.save_state(str(beside))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(beside / STATE_FILE, dataclasses.asdict(state))
            if state.best_update:
                _link(folder.parent / WEIGHTS_FILE, beside / BEST_FILE)
    accelerator.wait_for_everyone()


def load_checkpoint(folder: Path, accelerator: Accelerator) -> TrainingState:
    """Load weights and moments into what the accelerator prepared, and return the state.

    Raises:
        InputError: the folder is not a checkpoint of this script, or of another model.
    """
    state = read_state(folder)
    try:
        accelerator.load_state(str(folder))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--resume_from_checkpoint {folder} does not fit this run or is damaged: {reason}"
        ) from error
    # It counts micro-batches, and the checkpoint may be of a run that accumulated others.
    accelerator.step = 0
    return state


def restore_best(
    folder: Path,
    output_folder: Path,
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Put a checkpoint's best model into the output folder, where a resumed run keeps it."""
    if accelerator.is_main_process and (folder / BEST_FILE).exists():
        _write_model(output_folder, load_file(folder / BEST_FILE), accelerator, model, tokenizer)
    accelerator.wait_for_everyone()


def _link(source: Path, target: Path) -> None:
    """A hard link where the file system has them, as files here are replaced and not changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def read_state(folder: Path) -> TrainingState:
    """The state of a checkpoint.

    Raises:
        InputError: the folder is not a checkpoint of this script.
    """
    try:
        content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return TrainingState(**content)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"--resume_from_checkpoint {folder} is not a checkpoint of this script: it has no "
            f"readable {STATE_FILE}"
        ) from error


def export(
    folder: Path,
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the model and its tokenizer to `folder`, as `from_pretrained` reads them.

    All processes call this: sharded weights are gathered. Each file is replaced at once.
    """
    # Sharded models gather their weights; torch.compile's wrappers would rename them.
    plain = accelerator.unwrap_model(model, keep_torch_compile=False)
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    weights = accelerator.get_state_dict(model if sharded else plain)
    if accelerator.is_main_process:
        _write_model(folder, weights, accelerator, model, tokenizer)
    accelerator.wait_for_everyone()


def _write_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    plain = accelerator.unwrap_model(model, keep_torch_compile=False)
    with writing(folder), tempfile.TemporaryDirectory(prefix=".model-", dir=folder) as beside:
        plain.save_pretrained(beside, state_dict=dict(weights))
        tokenizer.save_pretrained(beside)
        for file in Path(beside).iterdir():
            # safetensors makes its files private; others may read what may be read in here.
            shutil.copymode(folder / CONFIG_FILE, file)
            file.replace(folder / file.name)
