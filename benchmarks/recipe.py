"""Train the recipes of docs/recipe.md over their seeds.

    python -m benchmarks.recipe --dataset_name DIR --model_name_or_path DIR --output_dir DIR

Each run is a folder `RECIPE.sSEED` that `python -m lib.compare` reads; its weights are removed once
`recipe_evaluations.py` has used them. A finished run is not trained again and a killed one resumes,
so the same command goes on where it was stopped. With `--record DIR` the finished runs are packed
into DIR/RECIPE.tar.xz at the end; unpacked into the output folder, they count as finished. Other
flags go to the script.
"""

import argparse
import dataclasses
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks import recipe_evaluations
from lib.checkpoints.atomic import replacing
from lib.checkpoints.best_model import WEIGHTS_FILE

ROOT = Path(__file__).parent.parent

SCREENING_SEEDS = range(1, 6)
SEEDS = range(1, 21)
# Of the combined score over the default's, at which a candidate is trained with all seeds.
LEAST_GAIN = 0.005
PLAIN, DEFAULT = "plain", "default"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is given to the script beside its defaults: flags, or a change of `recipe_variants`."""

    flags: str = ""
    variant: str | None = None


# The script's default is 5 epochs at 1e-4, batches of 32, 10% warm-up and weight decay 0.01.
RECIPES = {
    PLAIN: Recipe(
        "--num_train_epochs 3 --learning_rate 5e-5 --train_batch_size 16 --warmup_ratio 0 "
        "--weight_decay 0"
    ),
    DEFAULT: Recipe(),
    "epochs_10": Recipe("--num_train_epochs 10"),
    "lr_5e-5": Recipe("--learning_rate 5e-5"),
    "lr_2e-4": Recipe("--learning_rate 2e-4"),
    "layerwise_0.9": Recipe(variant="layerwise_decay"),
    "r_drop": Recipe(variant="r_drop"),
    "smoothing_0.1": Recipe("--label_smoothing 0.1"),
    "swap_pairs": Recipe(variant="swap_pairs"),
    "mean_pooling": Recipe(variant="mean_pooling"),
}
CANDIDATES = [name for name in RECIPES if name not in (PLAIN, DEFAULT)]

# What is left of a finished run, beside evaluations.npz.
KEPT = ("config.yaml", "manifest.json", "status.json", "all_results.json", "metrics.jsonl")
# Of absolute paths, all but the last name.
FOLDERS = re.compile(rb"(?<!\w)/(?:[^/\s\"']+/)+")


def folder_of(output_dir: Path, recipe: str, seed: int) -> Path:
    return output_dir / f"{recipe}.s{seed}"


def run(arguments: argparse.Namespace, job: tuple[str, int]) -> None:
    """Train a recipe with a seed, predict what the study needs, and remove the weights."""
    name, seed = job
    recipe, folder = RECIPES[name], folder_of(arguments.output_dir, name, seed)
    if (folder / recipe_evaluations.FILE).exists():
        return
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": arguments.mixed_precision}
    script = ["train_mrpc.py"]
    if recipe.variant:
        script = ["-m", "benchmarks.recipe_variants", recipe.variant]
    training = [
        *script,
        f"--dataset_name={arguments.dataset_name}",
        f"--model_name_or_path={arguments.model_name_or_path}",
        f"--output_dir={folder}",
        f"--seed={seed}",
        "--checkpointing_steps=epoch",
        *recipe.flags.split(),
        *arguments.more,
        *([] if name == DEFAULT else ["--max_predict_samples=1"]),
    ]
    evaluation = ["-m", "benchmarks.recipe_evaluations", str(folder)]
    if recipe.variant:
        evaluation += ["--variant", recipe.variant]
    logs = arguments.output_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{folder.name}.log").open("a") as log:
        for command in (training, evaluation):
            subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )
    print(f"{folder.name}: done", flush=True)
    _strip(folder)


def _strip(folder: Path) -> None:
    """Remove all but what a comparison reads, and the predictions for the test rows."""
    for path in folder.iterdir():
        if path.is_dir() and path.name != "predictions":
            shutil.rmtree(path)
        elif path.is_file() and path.name not in (*KEPT, recipe_evaluations.FILE):
            path.unlink()
    (folder / "predictions" / "test.jsonl").unlink()


def pack(output_dir: Path, recipe: str, record: Path) -> None:
    """Pack the finished runs of a recipe, without the folders and the user of this machine.

    The same runs give the same bytes.
    """
    record.mkdir(parents=True, exist_ok=True)
    with replacing(record / f"{recipe}.tar.xz") as new, tarfile.open(new, "w:xz") as archive:
        for folder in finished_runs(output_dir, recipe).values():
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                content = file.read_bytes()
                if file.name in KEPT:
                    content = FOLDERS.sub(b"", content)
                member = tarfile.TarInfo(str(file.relative_to(output_dir)))
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def finished_runs(output_dir: Path, recipe: str) -> dict[int, Path]:
    """The finished runs of a recipe, by seed."""
    found = (
        re.fullmatch(rf"{re.escape(recipe)}\.s(\d+)", path.name) for path in output_dir.iterdir()
    )
    runs = {int(match[1]): output_dir / match[0] for match in found if match}
    return {
        seed: runs[seed]
        for seed in sorted(runs)
        if (runs[seed] / recipe_evaluations.FILE).exists()
        and not (runs[seed] / WEIGHTS_FILE).exists()
    }


def jobs_of(recipes: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, int]]:
    """All recipes of a seed before the next, so that what is done can be compared at any time."""
    return ((recipe, seed) for seed in seeds for recipe in recipes)


def stages(output_dir: Path) -> Iterator[Iterator[tuple[str, int]]]:
    """The whole study: each stage is trained before the next is asked for.

    Leaving a candidate out after few seeds can only lose a difference, not make one up: a candidate
    that survives is judged by all of its seeds, and its p value corrected for all candidates.
    """
    yield jobs_of((PLAIN, DEFAULT), SEEDS)
    yield jobs_of(CANDIDATES, SCREENING_SEEDS)
    default = mean_last_score(output_dir, DEFAULT)
    scores = {name: mean_last_score(output_dir, name) for name in CANDIDATES}
    yield jobs_of([name for name in CANDIDATES if scores[name] >= default + LEAST_GAIN], SEEDS)


def mean_last_score(output_dir: Path, recipe: str) -> float:
    """The mean combined score of the screening seeds at their last update."""
    scores = []
    for seed in SCREENING_SEEDS:
        lines = (folder_of(output_dir, recipe, seed) / "metrics.jsonl").read_text().splitlines()
        scores.append(json.loads(lines[-1])["eval_combined_score"])
    return statistics.mean(scores)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--output_dir", required=True, type=lambda path: Path(path).resolve())
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), help="default: the study")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of --recipes")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--record", type=Path, help="folder for the packed results")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    arguments, arguments.more = parser.parse_known_args()
    some = [jobs_of(arguments.recipes, arguments.seeds)] if arguments.recipes else None
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for jobs in some or stages(arguments.output_dir):
            list(pool.map(partial(run, arguments), jobs))
    if arguments.record:
        for recipe in arguments.recipes or RECIPES:
            pack(arguments.output_dir, recipe, arguments.record)


if __name__ == "__main__":
    main()
