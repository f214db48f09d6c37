"""The best model in the output folder, as `from_pretrained` and `pipeline` load it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedTokenizerBase

from lib.checkpoints.output import CONFIG_FILE, beside, remove, writing
from lib.distributed.collectives import on_main_process

WEIGHTS_FILE = "model.safetensors"


def export(
    folder: Path,
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the model and its tokenizer to `folder`; each file is replaced at once.

    All processes call this: sharded weights are gathered.

    Raises:
        InputError: on all processes, if the folder cannot be written.
    """
    # torch.compile's wrappers would rename the weights.
    plain = accelerator.unwrap_model(model, keep_torch_compile=False)
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    weights = accelerator.get_state_dict(model if sharded else plain)

    def write(new: Path) -> None:
        plain.save_pretrained(new, state_dict=dict(weights))
        tokenizer.save_pretrained(new)

    on_main_process(accelerator, lambda: _replace(folder, write))


def restore(
    weights_file: Path,
    folder: Path,
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Put the best model that a checkpoint holds back into `folder`, bit for bit.

    Raises:
        InputError: as `export`.
    """
    plain = accelerator.unwrap_model(model, keep_torch_compile=False)

    def write(new: Path) -> None:
        plain.config.save_pretrained(new)
        tokenizer.save_pretrained(new)
        link(weights_file, new / WEIGHTS_FILE)

    on_main_process(accelerator, lambda: _replace(folder, write))


def _replace(folder: Path, write: Callable[[Path], None]) -> None:
    new = beside(folder / "model")
    with writing(folder):
        try:
            remove(new)
            write(new)
            for file in new.iterdir():
                if file.name != WEIGHTS_FILE or file.stat().st_nlink == 1:
                    # safetensors makes its files private; others may read what may be read in here.
                    shutil.copymode(folder / CONFIG_FILE, file)
                file.replace(folder / file.name)
        finally:
            remove(new)


def link(source: Path, target: Path) -> None:
    """A hard link where the file system has them, as files here are replaced and not changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
