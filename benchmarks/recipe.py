"""Run recipes over several seeds, and print the table that docs/recipe.md keeps.

    python -m benchmarks.recipe --dataset_name DIR --model_name_or_path DIR --output_dir DIR

A run that has its results is not run again, so an interrupted series goes on where it stopped.
For each recipe the table gives mean and standard deviation over the seeds, of the best evaluation
(which the run keeps) and of the last (which no choice on the validation pairs has flattered).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# What is usual, and changes known to help when rows are few: Mosbach et al. (2021), Zhang et al.
# (2021). What is not named is the script's default: 5 epochs at 1e-4, batches of 32, 10% warm-up.
RECIPES = {
    "plain": "--num_train_epochs 3 --learning_rate 5e-5 --train_batch_size 16 --warmup_ratio 0 "
    "--weight_decay 0",
    "default": "",
    "half the learning rate": "--learning_rate 5e-5",
    "twice the learning rate": "--learning_rate 2e-4",
    "batches of 16": "--train_batch_size 16",
    "less for lower layers": "--layerwise_lr_decay 0.9",
    "new top layer": "--reinit_layers 1",
}


def folder_of(output_dir: Path, recipe: str, seed: int) -> Path:
    return output_dir / f"{recipe.replace(' ', '_')}.s{seed}"


def run(arguments: argparse.Namespace, recipe: str, seed: int) -> None:
    folder = folder_of(arguments.output_dir, recipe, seed)
    if (folder / "all_results.json").exists():
        return
    command = [
        sys.executable,
        "train_mrpc.py",
        f"--dataset_name={arguments.dataset_name}",
        f"--model_name_or_path={arguments.model_name_or_path}",
        f"--output_dir={folder}",
        f"--seed={seed}",
        "--max_predict_samples=1",
        "--overwrite_output_dir",
        *RECIPES[recipe].split(),
    ]
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": arguments.mixed_precision}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def table(output_dir: Path) -> str:
    """Markdown, a row for each recipe that has finished runs."""
    lines = [
        "| recipe | seeds | best: accuracy | F1 | last: accuracy | F1 |",
        "|---|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        best, last = [], []
        seeds = []
        for seed in range(1, 100):
            folder = folder_of(output_dir, recipe, seed)
            if not (folder / "all_results.json").exists():
                continue
            evaluations = [
                line
                for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
                if "eval_accuracy" in line
            ]
            seeds.append(str(seed))
            last.append(evaluations[-1])
            best.append(max(evaluations, key=lambda line: line["eval_combined_score"]))
        if seeds:
            cells = [
                spread([line[f"eval_{metric}"] for line in chosen])
                for chosen in (best, last)
                for metric in ("accuracy", "f1")
            ]
            lines.append(f"| {recipe} | {', '.join(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and standard deviation, in percent."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_name", required=True, type=lambda path: Path(path).resolve())
    parser.add_argument(
        "--model_name_or_path", required=True, type=lambda path: Path(path).resolve()
    )
    parser.add_argument("--output_dir", required=True, type=lambda path: Path(path).resolve())
    parser.add_argument("--recipes", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3, 4, 5])
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            run(arguments, recipe, seed)
    print(table(arguments.output_dir))


if __name__ == "__main__":
    main()
