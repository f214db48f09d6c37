"""What a run of the recipe study does not write itself: more predictions on the validation rows.

    python -m benchmarks.recipe_evaluations RUN [--variant NAME]

It writes RUN/evaluations.npz, in which all logits are (rows, classes) in the order of the rows:

- `updates` and `logits`: of each evaluation, from the checkpoint of its epoch;
- `averaged`: of the mean of the weights at the last evaluations;
- `swapped` and `test_swapped`: of the best model, with the two texts of each pair swapped.
"""

import argparse
import contextlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

from benchmarks.recipe_variants import VARIANTS
from lib.checkpoints.atomic import replacing
from lib.checkpoints.best_model import WEIGHTS_FILE
from lib.checkpoints.run_folder import read_config
from lib.cli.config import TrainConfig
from lib.data.tokenizing import encode_rows, tokenizer_key
from lib.report.predictions import read_predictions
from lib.training.evaluation import evaluation_loaders, predict
from lib.training.metrics import probabilities_of
from train_mrpc import load_inputs, make_loaders

FILE = "evaluations.npz"
NUM_AVERAGED = 3


def predict_more(run: Path) -> dict[str, np.ndarray]:
    """Return the arrays of the file, from the run's checkpoints and its best model."""
    config = TrainConfig(**(read_config(run) or {}), dry_run=True)
    accelerator = Accelerator()
    splits, tokenizer, tokenized, model = load_inputs(config, None)
    model = accelerator.prepare(model)
    _, collator, _, loaders = make_loaders(config, tokenizer, tokenized, accelerator)
    names = list(splits.task.columns)
    encode = partial(
        encode_rows, tokenizer=tokenizer, columns=names[::-1], max_length=config.max_length
    )
    key = f"{tokenizer_key(tokenizer, max_length=config.max_length)} swapped"
    swapped = splits.map(
        encode, batched=True, with_indices=True, remove_columns=names, cache_key=key
    )
    batch_size = config.per_device_eval_batch_size
    swapped_loaders = evaluation_loaders(swapped, batch_size, collator, accelerator)

    def logits(model: torch.nn.Module, loader: object) -> np.ndarray:
        return predict(model, loader, accelerator, lambda: None).logits

    checkpoints = sorted(run.glob("epoch_*"), key=lambda path: int(path.name.split("_")[1]))
    averaged, evaluations = AveragedModel(model), []
    for number, checkpoint in enumerate(checkpoints):
        model.load_state_dict(load_file(checkpoint / WEIGHTS_FILE))
        evaluations.append(logits(model, loaders["validation"]))
        if number >= len(checkpoints) - NUM_AVERAGED:
            averaged.update_parameters(model)
    found = {
        "logits": np.stack(evaluations),
        "averaged": logits(averaged, loaders["validation"]),
    }
    model.load_state_dict(load_file(run / WEIGHTS_FILE))
    for name, split in (("swapped", "validation"), ("test_swapped", "test")):
        found[name] = logits(model, swapped_loaders[split])
    _check_best(run, found["logits"], splits.task.labels)
    return found


def _check_best(run: Path, evaluations: np.ndarray, names: tuple[str, ...]) -> None:
    """Check that one evaluation is, bit for bit, the one that the run kept as its best."""
    written, _ = read_predictions(run / "predictions" / "validation.jsonl", names)
    assert any((probabilities_of(logits) == written).all() for logits in evaluations), run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--variant", choices=list(VARIANTS))
    arguments = parser.parse_args()
    change = VARIANTS[arguments.variant] if arguments.variant else contextlib.nullcontext
    with change():
        found = predict_more(arguments.run)
    with replacing(arguments.run / FILE) as new, new.open("wb") as file:
        np.savez_compressed(file, **found)


if __name__ == "__main__":
    main()
