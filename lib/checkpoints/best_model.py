"""The best model in the output folder, as `from_pretrained` and `pipeline` load it."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import custom_object_save

from lib.checkpoints.atomic import beside, link, remove, writing
from lib.checkpoints.run_folder import CONFIG_FILE
from lib.checkpoints.tensors import gather_weights
from lib.distributed.collectives import on_main_process
from lib.model.adapters import merge_adapters
from lib.model.layers import shorten_last

WEIGHTS_FILE = "model.safetensors"


class BestModel:
    """Saves the model and its tokenizer to the output folder; each file is replaced at once."""

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.folder = folder
        self.accelerator = accelerator
        # Without torch.compile's wrapper, which would rename the weights.
        self.plain = accelerator.unwrap_model(model, keep_torch_compile=False)
        self.tokenizer = tokenizer

    def save(self) -> None:
        """Save the weights as they are now. All processes call this: it gathers shards.

        Raises:
            InputError: on all processes, if the folder cannot be written.
        """
        weights = merge_adapters(self.plain, gather_weights(self.accelerator, self.plain))
        write = partial(self._write_new, weights)
        on_main_process(self.accelerator, partial(self._replace, write))

    def restore(self, weights_file: Path) -> None:
        """Put the best model that a checkpoint holds back into the folder, bit for bit.

        Raises:
            InputError: as `save`.
        """
        on_main_process(
            self.accelerator, partial(self._replace, partial(self._write_saved, weights_file))
        )

    def load(self, *, trust_remote_code: bool) -> PreTrainedModel:
        """Load the best model as its users will, on the device of this process."""
        model = AutoModelForSequenceClassification.from_pretrained(
            self.folder, trust_remote_code=trust_remote_code
        )
        shorten_last(model)
        return model.to(self.accelerator.device)

    def _write_new(self, weights: dict[str, Tensor], new: Path) -> None:
        dtype = next(iter(weights.values())).dtype
        self.plain.save_pretrained(new, state_dict=weights)  # may empty `weights`
        if dtype != self.plain.dtype:  # DeepSpeed's model may be in bf16, and config.json says so
            self.plain.config.dtype = dtype
            self.plain.config.save_pretrained(new)

    def _write_saved(self, weights_file: Path, new: Path) -> None:
        self.plain.config.save_pretrained(new)
        if self.plain._auto_class is not None:  # the code that the user trusts
            custom_object_save(self.plain, new, config=self.plain.config)
        link(weights_file, new / WEIGHTS_FILE)

    def _replace(self, write: Callable[[Path], object]) -> None:
        new = beside(self.folder / "model")
        with writing(self.folder):
            try:
                remove(new)
                new.mkdir()
                write(new)
                self.tokenizer.save_pretrained(new)
                for file in new.iterdir():
                    if file.name != WEIGHTS_FILE or file.stat().st_nlink == 1:
                        # safetensors writes mode 0600: copy the permissions of config.yaml.
                        shutil.copymode(self.folder / CONFIG_FILE, file)
                    file.replace(self.folder / file.name)
            finally:
                remove(new)
