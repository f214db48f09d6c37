"""What the number of rows costs at the start of a run: seconds, and memory of each process.

    python -m benchmarks.scale --model_name_or_path DIR --rows 4000 40000 400000 4000000

Makes pairs of sentences of MRPC's lengths, and loads them in fresh processes, through the functions
that the script calls: once with empty caches, and once more with full ones. A start goes from the
first line of loading to the first batch, without imports and model. Memory is what a cached start
adds to the process, and in brackets for each row more than in the line above.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerBase

from lib.data.batching import FillingCollator, MicroBatches, plan_epoch
from lib.data.splits import ROWS_PER_BATCH, load_splits
from lib.data.tokenizing import model_columns, row_lengths

ROOT = Path(__file__).parent.parent
MAX_LENGTH = 128
NUM_VALIDATION = 1000
NUM_SENTENCES = 20_000  # that pairs are drawn from
WORDS_PER_SENTENCE = (24, 7)  # mean and standard deviation; some 53 tokens a pair, as in MRPC
TOKENIZED_ALONE = 100_000  # rows at most: the tokenizer takes as long for each of them


def make_data(folder: Path, num_rows: int, words: list[str]) -> None:
    """Write train and validation, the same rows as CSV and as Parquet; the same at every call."""
    generator = np.random.default_rng(0)
    frequencies = 1 / np.arange(1, len(words) + 1)  # Zipf's law
    shuffled = generator.permutation(np.array(words))
    lengths = generator.normal(*WORDS_PER_SENTENCE, NUM_SENTENCES).round().clip(4, 60).astype(int)
    drawn = generator.choice(shuffled, lengths.sum(), p=frequencies / frequencies.sum())
    ends = np.cumsum(lengths)
    sentences = pyarrow.array(
        [" ".join(drawn[end - n : end]) + "." for end, n in zip(ends, lengths, strict=True)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", num_rows), ("validation", NUM_VALIDATION)):
        pairs = generator.integers(NUM_SENTENCES, size=(2, count))
        labels = generator.integers(2, size=count)
        table = pyarrow.table(
            {
                "sentence1": sentences.take(pyarrow.array(pairs[0])),
                "sentence2": sentences.take(pyarrow.array(pairs[1])),
                "label": labels,
            }
        )
        pyarrow.csv.write_csv(table, folder / f"{split}.csv")
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")


def measure_start(files: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Seconds and bytes from the files to the first batch; what caches lack is made."""
    before = memory()
    started = time.perf_counter()
    splits = load_splits(files, task_name=None)
    rows = splits.tokenized(tokenizer, max_length=MAX_LENGTH)
    fingerprint = splits.fingerprint()
    lengths = row_lengths(rows.train)
    planning = time.perf_counter()
    sampler = MicroBatches(
        lambda epoch: plan_epoch(lengths, seed=42, epoch=epoch, batch_size=32, num_micro_batches=2)
    )
    planned = time.perf_counter()
    pad = DataCollatorWithPadding(tokenizer)
    collate = FillingCollator(pad, model_columns(rows.train), MAX_LENGTH)
    batch = next(iter(DataLoader(rows.train, batch_sampler=sampler, collate_fn=collate)))
    seconds = time.perf_counter() - started
    gc.collect()
    added = {name: after - before[name] for name, after in memory().items()}
    assert len(batch["labels"]) <= 16
    assert len(fingerprint) == 64
    return {"seconds": seconds, "planning": planned - planning, **added}


def measure_tokenizer(
    files: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Seconds that the tokenizer alone takes for the training texts."""
    train = load_splits(files, task_name=None).train
    few = train.select(range(min(len(train), TOKENIZED_ALONE)))
    seconds = 0.0
    for batch in few.iter(ROWS_PER_BATCH):
        started = time.perf_counter()
        tokenizer(batch["sentence1"], batch["sentence2"], truncation=True, max_length=MAX_LENGTH)
        seconds += time.perf_counter() - started
    return {"seconds": seconds * len(train) / len(few)}


def memory() -> dict[str, int]:
    """Bytes of this process: its own, and all that are resident (mapped files count there)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return {"anonymous": sizes["Anonymous"], "resident": sizes["Rss"]}


def in_fresh_process(what: str, folder: Path, ending: str, model: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", "--measure", what, str(folder), ending, model],
        cwd=ROOT,
        env={**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(what: str, folder: str, ending: str, model: str) -> None:
    """Print one measurement as JSON; runs in a process of its own."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    files = {name: str(Path(folder) / f"{name}.{ending}") for name in ("train", "validation")}
    work = measure_tokenizer if what == "tokenizer" else measure_start
    print(json.dumps(work(files, tokenizer)))


def table(results: dict[int, dict[str, dict[str, float]]]) -> str:
    """The measurements in Markdown, a line for each number of rows."""
    lines = [
        "| rows | tokenizer alone, s | first start, s | cached start, s | of that, planning, s "
        "| own memory | resident memory |",
        "|---|---|---|---|---|---|---|",
    ]
    before: dict[str, float] | None = None
    rows_before = 0
    for num_rows, result in results.items():
        cached = result["cached"]
        cells = [
            f"{num_rows:,}",
            f"{result['tokenizer']['seconds']:.2f}",
            f"{result['first']['seconds']:.2f}",
            f"{cached['seconds']:.2f}",
            f"{cached['planning']:.3f}",
        ]
        for name in ("anonymous", "resident"):
            cell = f"{cached[name] / 1e6:.1f} MB"
            if before is not None:
                more = (cached[name] - before[name]) / (num_rows - rows_before)
                cell += f" ({more:.0f} B/row)"
            cells.append(cell)
        before, rows_before = cached, num_rows
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(flags: list[str]) -> None:
    if flags[:1] == ["--measure"]:
        measure(*flags[1:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[4_000, 40_000, 400_000])
    parser.add_argument("--format", choices=["csv", "parquet"], default="csv")
    parser.add_argument("--folder", help="for data and caches, some 2 KB a row; default: temporary")
    arguments = parser.parse_args(flags)
    model = arguments.model_name_or_path
    vocabulary = AutoTokenizer.from_pretrained(model).get_vocab()
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha())
    results: dict[int, dict[str, Any]] = {}
    for num_rows in sorted(arguments.rows):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            folder = Path(scratch)
            make_data(folder, num_rows, words)
            results[num_rows] = {
                name: in_fresh_process(what, folder, arguments.format, model)
                for name, what in (
                    ("first", "start"),
                    ("cached", "start"),
                    ("tokenizer", "tokenizer"),
                )
            }
            print(json.dumps({num_rows: results[num_rows]}), file=sys.stderr)
    print(table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
