"""A BERT that runs out of memory in the middle of a training, with the real allocator's error.

As a script, on each of the processes that torchrun started: trains on small memory on rank 1 alone.

    small_memory.py OUTPUT_DIR FLAG ...
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from transformers.models.bert.modeling_bert import BertEmbeddings

sys.path.insert(0, str(Path(__file__).parents[2]))

PLACES = ("forward", "backward")


def run_out_of_memory(*_: object) -> None:
    torch.empty(2**60, dtype=torch.uint8)


@contextlib.contextmanager
def memory_for(rows: int, *, after: int, where: str) -> Iterator[list[int]]:
    """Fail over more than so many rows, after so many passes; yields the rows of those that failed.

    A forward pass fails at its beginning, a backward pass when only the embeddings are left.
    """
    failed: list[int] = []
    passes = 0
    forward = BertEmbeddings.forward

    def limited(module, *arguments, **named):
        nonlocal passes
        embedded = forward(module, *arguments, **named)
        if module.training:
            passes += 1
            if passes > after and len(embedded) > rows:
                failed.append(len(embedded))
                if where == "forward":
                    run_out_of_memory()
                embedded.register_hook(run_out_of_memory)
        return embedded

    with mock.patch.object(BertEmbeddings, "forward", limited):
        yield failed


if __name__ == "__main__":
    from accelerate import Accelerator

    from lib.cli.parsing import parse_arguments
    from lib.report import results
    from train_mrpc import main

    # As in end_to_end/worker.py.
    Accelerator.end_training = lambda _: None
    results.write_report = lambda *_: None

    folder, *flags = sys.argv[1:]
    for place in PLACES:
        rows = 2 if os.environ["RANK"] == "1" else 1000
        with memory_for(rows, after=3, where=place) as failed:
            main(parse_arguments([*flags, f"--output_dir={folder}/{place}"]))
        assert failed == ([4] if rows == 2 else []), failed
