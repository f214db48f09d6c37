"""The model of a finished run, and what its run knows of the rows that it takes."""

import dataclasses
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lib.checkpoints.run_folder import CONFIG_FILE, read_config, read_status
from lib.data.tasks import TASKS, Task
from lib.errors import InputError
from lib.model.layers import shorten_last
from lib.model.loading import load_tokenizer
from lib.report.finished_run import AGAIN, read_task

WEIGHTS = "*.safetensors"


@dataclasses.dataclass(frozen=True)
class FinishedModel:
    """An output folder with a model in it; `config` holds the fields of config.yaml."""

    folder: Path
    task: Task
    config: dict[str, Any]

    @property
    def files(self) -> list[Path]:
        """The files that decide what the model computes of the tokens of a row."""
        return [self.folder / "config.json", *sorted(self.folder.glob(WEIGHTS))]

    def batching(self, batch_size: int | None) -> dict[str, Any]:
        """How rows are cut to length, batched and padded; by default as in the run."""
        return {
            "max_length": self.config["max_length"],
            "pad_to_max_length": self.config["pad_to_max_length"],
            "batch_size": batch_size or self.config["per_device_eval_batch_size"],
        }

    def load(self, *, trust_remote_code: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the model and its tokenizer, on the CPU.

        Raises:
            InputError: they are damaged, or need code that is not trusted.
        """
        if self.config["trust_remote_code"] and not trust_remote_code:
            raise InputError(
                f"{self.folder}: the run trusted code that came with its model; read the .py files "
                "in the folder, and give --trust_remote_code to execute them"
            )
        use_fast = not self.config["use_slow_tokenizer"]
        tokenizer = load_tokenizer(str(self.folder), None, trust_remote_code, use_fast=use_fast)
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                self.folder, trust_remote_code=trust_remote_code, use_safetensors=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{self.folder}: its model cannot be loaded: {reason}") from error
        shorten_last(model)
        return model, tokenizer


def read_finished_model(folder: Path) -> FinishedModel:
    """Read all but the weights of an output folder.

    Raises:
        InputError: it holds no finished run, or no model.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the --output_dir of a finished run")
    config, status = read_config(folder), read_status(folder).get("status")
    if config is None or status is None:
        raise InputError(
            f"{folder} is not the output folder of a run: it has no {CONFIG_FILE} or no "
            "status.json; give the --output_dir of a finished run"
        )
    if status != "finished":
        raise InputError(f"{folder}: its run is {status}, not finished; {AGAIN} to complete it")
    if not (folder / "config.json").is_file() or not any(folder.glob(WEIGHTS)):
        raise InputError(f"{folder} holds no model (config.json, model.safetensors); {AGAIN}")
    task = read_task(folder)
    if config["task_name"] is not None:
        glue = TASKS[config["task_name"]]
        task = dataclasses.replace(
            task, submissions=glue.submissions, submits_names=glue.submits_names
        )
    return FinishedModel(folder, task, config)
