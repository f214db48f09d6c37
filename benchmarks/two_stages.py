"""Train on a larger task of pairs first: what is that worth where rows are few?

    python -m benchmarks.two_stages --output_dir runs

The larger task is the demo's, of 2,400 pairs. The smaller one has other pairs of its generator: 200
to train on, 400 to validate on. Each seed trains on the smaller one, from the demo's pretrained
model (`one_stage.sSEED`) and from the folder of the first stage (`two_stages.sSEED`), and
`lib.compare` compares them.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

from lib.demo.corpus import MODEL_DIR
from lib.demo.generator import make_pairs

ROOT = Path(__file__).parent.parent
NUM_PAIRS = {"train": 200, "validation": 400}
SEEDS = range(1, 6)
RECIPE = ("--num_train_epochs=10", "--learning_rate=5e-4", "--max_length=96")


def write_pairs(folder: Path) -> list[str]:
    """Write the smaller task as CSV files and return the flags that name them."""
    flags = []
    for offset, (split, number) in enumerate(NUM_PAIRS.items()):
        path = folder / f"{split}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ("sentence1", "sentence2", "label"))
            writer.writeheader()
            for pair in make_pairs(number, seed=201 + offset):  # seeds that the demo does not use
                del pair["idx"]
                writer.writerow(pair)  # labels as numbers: the first stage's classifier is kept
        flags.append(f"--{split}_file={path}")
    return flags


def train(folder: Path, *flags: str) -> None:
    """Train, or do nothing if the run in the folder is finished."""
    command = [sys.executable, "train_mrpc.py", f"--output_dir={folder}", *flags]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", required=True, type=lambda path: Path(path).resolve())
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    arguments = parser.parse_args()
    folder: Path = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    data = write_pairs(folder)
    train(folder / "first_stage", "--demo")
    starts = {"one_stage": MODEL_DIR, "two_stages": folder / "first_stage"}
    for seed in arguments.seeds:
        for name, start in starts.items():
            flags = (*data, *RECIPE, f"--model_name_or_path={start}", f"--seed={seed}")
            train(folder / f"{name}.s{seed}", *flags)
    one, two = ([str(folder / f"{name}.s{seed}") for seed in arguments.seeds] for name in starts)
    command = [sys.executable, "-m", "lib.compare", *two, "--against", *one]
    subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
