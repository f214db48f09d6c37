"""Time train_mrpc.py against what users run instead, alternating with it.

    python -m benchmarks.compare --dataset_name DIR --model_name_or_path DIR
    python -m benchmarks.compare ... --peer path/to/run_glue_no_trainer.py

Each pair runs both programs over the same number of rows with the same batch, threads and dropout;
the other in fp32, as its documentation runs it, ours in --mixed_precision. Steady training is
compared with `plain_loop.py`, whole runs (start-up, training, evaluation, saving) with the peer.
Medians over the pairs, and of the ratio within pairs, since a machine's speed drifts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def timed(command: Sequence[str]) -> tuple[str, float]:
    """Standard output and wall seconds of a command that must succeed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout, time.perf_counter() - started


def ours(arguments: argparse.Namespace) -> dict[str, float]:
    """Rates of steady training, and the seconds of the whole run."""
    with tempfile.TemporaryDirectory() as folder:
        _, seconds = timed(
            [
                sys.executable,
                "train_mrpc.py",
                *common_flags(arguments),
                f"--train_batch_size={arguments.train_batch_size}",
                "--warmup_ratio=0",
                "--weight_decay=0.01",
                f"--mixed_precision={arguments.mixed_precision}",
                f"--max_eval_samples={arguments.max_eval_samples}",
                "--max_predict_samples=1",
                f"--output_dir={folder}",
            ]
        )
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
    return {
        "examples/s": manifest["train_examples_per_second"],
        "tokens/s": manifest["train_tokens_per_second"],
        "seconds": seconds,
    }


def plain(arguments: argparse.Namespace) -> dict[str, float]:
    """The same of the plain loop."""
    command = [sys.executable, "benchmarks/plain_loop.py"]
    printed, seconds = timed(
        [
            *command,
            f"--dataset_name={arguments.dataset_name}",
            f"--model_name_or_path={arguments.model_name_or_path}",
            f"--train_batch_size={arguments.train_batch_size}",
            f"--max_train_samples={arguments.max_train_samples}",
        ]
    )
    measured = json.loads(printed.splitlines()[-1])
    return {
        "examples/s": measured["rows"] / measured["seconds"],
        "tokens/s": measured["tokens"] / measured["seconds"],
        "seconds": seconds,
    }


def peer(arguments: argparse.Namespace, files: dict[str, Path]) -> dict[str, float]:
    """The seconds of a whole run of the peer's script, on the same rows as files."""
    with tempfile.TemporaryDirectory() as folder:
        _, seconds = timed(
            [
                sys.executable,
                arguments.peer,
                f"--model_name_or_path={arguments.model_name_or_path}",
                f"--train_file={files['train']}",
                f"--validation_file={files['validation']}",
                f"--per_device_train_batch_size={arguments.train_batch_size}",
                "--num_train_epochs=1",
                f"--output_dir={folder}",
            ]
        )
    return {"seconds": seconds}


def common_flags(arguments: argparse.Namespace) -> list[str]:
    return [
        f"--dataset_name={arguments.dataset_name}",
        f"--model_name_or_path={arguments.model_name_or_path}",
        f"--max_train_samples={arguments.max_train_samples}",
        "--num_train_epochs=1",
    ]


def write_files(arguments: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """The rows that all programs train and are evaluated on, as the CSV that the peer reads."""
    import datasets

    rows = datasets.load_dataset(arguments.dataset_name)
    counts = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}
    paths = {}
    for split, count in counts.items():
        paths[split] = folder / f"{split}.csv"
        first = rows[split].select(range(min(count, len(rows[split]))))
        first.remove_columns("idx").to_csv(str(paths[split]))
    return paths


def report(name: str, mine: list[dict[str, float]], others: list[dict[str, float]]) -> None:
    """A line for each figure: medians, and the median and range of the ratio within pairs."""
    for figure in others[0]:
        faster = figure != "seconds"
        ratios = [
            a[figure] / b[figure] if faster else b[figure] / a[figure]
            for a, b in zip(mine, others, strict=True)
        ]
        print(
            f"{figure:>12}: train_mrpc.py {statistics.median(m[figure] for m in mine):.2f}, "
            f"{name} {statistics.median(o[figure] for o in others):.2f}, "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_name", required=True, help="folder with MRPC")
    parser.add_argument("--model_name_or_path", required=True, help="folder with a BERT")
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--max_train_samples", type=int, default=960)
    parser.add_argument("--max_eval_samples", type=int, default=408)
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "auto"], default="no")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--peer", help="path of the peer's script")
    arguments = parser.parse_args()
    arguments.dataset_name = str(Path(arguments.dataset_name).resolve())
    arguments.model_name_or_path = str(Path(arguments.model_name_or_path).resolve())

    with tempfile.TemporaryDirectory() as folder:
        files = write_files(arguments, Path(folder)) if arguments.peer else {}
        mine, others = [], []
        for _ in range(arguments.pairs):
            mine.append(ours(arguments))
            others.append(peer(arguments, files) if arguments.peer else plain(arguments))
            report("the other", mine[-1:], others[-1:])
    print(f"\nmedians of {arguments.pairs} pairs")
    report(Path(arguments.peer).name if arguments.peer else "plain loop", mine, others)


if __name__ == "__main__":
    main()
