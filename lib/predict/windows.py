"""Predict rows a window at a time, and keep each window on the disk.

A window is a fixed range of rows: the batches that it is cut into, and so its logits, do not depend
on the number of processes, nor on where an earlier start was killed. Processes take windows in
turn and meet only when all are done.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from lib.backends import devices
from lib.checkpoints.atomic import remove, replacing, write_json, writing
from lib.checkpoints.run_folder import FolderLock
from lib.data import batching
from lib.data.tasks import IGNORED
from lib.data.tokenizing import encode_rows
from lib.errors import InputError

Logits = NDArray[np.float32]

# Rows of a window: what a killed prediction loses at most, and what is sorted by length.
ROWS_PER_WINDOW = 4096

IDENTITY_FILE = "identity.json"


def logits_function(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    *,
    max_length: int,
    pad_to_max_length: bool,
    batch_size: int,
) -> Callable[[Mapping[str, Sequence[str]]], Logits]:
    """Return a function from text columns to (rows, classes) logits, on the device of this process.

    Up to `ROWS_PER_WINDOW` rows are batched and padded as at the end of a run on one process.
    """
    model = model.to(accelerator.device).eval()
    compiled = devices.compiles_shapes(accelerator)
    pad = DataCollatorWithPadding(
        tokenizer,
        padding="max_length" if pad_to_max_length else "longest",
        max_length=max_length if pad_to_max_length else None,
        pad_to_multiple_of=batching.compiled_multiple(max_length) if compiled else None,
    )

    @torch.no_grad()
    def logits_of(texts: Mapping[str, Sequence[str]]) -> Logits:
        num_rows = len(next(iter(texts.values())))
        encoded = encode_rows(
            texts, range(num_rows), tokenizer=tokenizer, columns=[*texts], max_length=max_length
        )
        del encoded["row"]
        collator = batching.FillingCollator(
            pad, [*encoded], max_length, batch_size if compiled else None
        )
        lengths = np.array([len(tokens) for tokens in encoded["input_ids"]])
        plan = batching.plan_evaluation(lengths, batch_size=batch_size, num_processes=1)
        batches = []
        for (rows,) in plan:
            filled = [
                {name: values[row] for name, values in encoded.items()}
                | {"labels": IGNORED, "row": row}
                for row in rows
            ]
            batch = collator(filled)
            inputs = {name: batch[name].to(accelerator.device) for name in encoded}
            with accelerator.autocast():
                logits = model(**inputs).logits
            batches.append(logits[: len(rows)].float().cpu().numpy())
        result = np.empty((num_rows, batches[0].shape[1]), np.float32)
        result[plan.order] = np.concatenate(batches)
        return result

    return logits_of


class Windows:
    """The windows that are predicted, in a folder beside the output until that is written.

    Args:
        folder: where they lie.
        num_rows: of the files to predict.
    """

    def __init__(self, folder: Path, num_rows: int) -> None:
        self.folder = folder
        self.starts = range(0, num_rows, ROWS_PER_WINDOW)
        self.lock = FolderLock(folder)

    def claim(self, identity: Mapping[str, Any], *, overwrite: bool) -> list[int]:
        """Lock the folder, and return the first rows of the windows that are to be predicted.

        Those that an earlier start of this prediction left are kept.

        Args:
            identity: all that decides the logits.
            overwrite: whether to drop what an earlier start of another prediction left.

        Raises:
            InputError: they are of another prediction, a process is at work on them, or the folder
                cannot be written.
        """
        self.lock.acquire(seconds=0)
        path = self.folder / IDENTITY_FILE
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if before == identity:
            missing = [start for start in self.starts if not self._path(start).exists()]
            done = len(self.starts) - len(missing)
            print(f"resuming: {done} of {len(self.starts)} windows are predicted", flush=True)
            return missing
        if before is not None and not overwrite:
            changed = [name for name, value in identity.items() if before.get(name) != value]
            raise InputError(
                f"{self.folder} holds an unfinished prediction with another {', '.join(changed)}: "
                "give what it was started with, or --overwrite to drop it"
            )
        with writing(self.folder):
            for file in self.folder.glob("*.npy"):
                file.unlink()
        write_json(path, identity)
        return [*self.starts]

    def predict(
        self,
        missing: Sequence[int],
        texts: Callable[[int, int], Mapping[str, Sequence[str]]],
        logits_of: Callable[[Mapping[str, Sequence[str]]], Logits],
        accelerator: Accelerator,
    ) -> None:
        """Predict this process's share of the windows that are missing.

        Args:
            missing: as `claim` returns them.
            texts: the text columns from a row, and a number of rows.

        Raises:
            InputError: the model gives NaN or infinity, or the folder cannot be written.
        """
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        silent = None if accelerator.is_main_process else True  # None: unless on a terminal
        for start in tqdm(mine, unit="window", disable=silent):
            logits = logits_of(texts(start, ROWS_PER_WINDOW))
            bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
            if len(bad):
                raise InputError(
                    f"row {start + bad[0] + 1}: the model's output is not finite; predict in "
                    "higher precision, without --mixed_precision"
                )
            with replacing(self._path(start)) as new, new.open("wb") as file:
                np.save(file, logits)

    def __iter__(self) -> Iterator[tuple[int, Logits]]:
        """Yield the first row and the logits of each window, in order.

        Raises:
            InputError: one is missing, as it was written to the disk of another machine.
        """
        for start in self.starts:
            if not self._path(start).exists():
                raise InputError(
                    f"{self.folder} is not shared by all machines: give an --output that is"
                )
            yield start, np.load(self._path(start), allow_pickle=False)

    def remove(self) -> None:
        """Remove the folder, once the output is written."""
        remove(self.folder)

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:012}.npy"
