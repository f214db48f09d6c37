"""The corpus of `--demo`: MRPC-like sentence pairs that are generated, not downloaded.

`lib/demo/generator.py` describes them. Accuracy on the validation split, printed by
`python -m lib.demo.corpus`:

    majority class                                            0.6625
    overlap threshold (Jaccard of words, best on train)       0.6675

The bundled model, made by `lib.demo.pretrain` from other pairs of the same generator and fine-tuned
with `DEFAULTS`, reaches 0.926 on average over five seeds (0.915 to 0.9325).
"""

import filecmp
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib.demo.generator import LABELS, POSITIVE_SHARE, make_pairs

VERSION = 1
MODEL_DIR = Path(__file__).parent / "tiny_bert"


class Split(NamedTuple):
    """Size and seed of one split."""

    num_pairs: int
    seed: int


SPLITS = {
    "train": Split(2400, 101),
    "validation": Split(400, 102),
    "test": Split(400, 103),
}

DEFAULTS: dict[str, object] = {
    "dataset_name": "demo",
    "model_name_or_path": str(MODEL_DIR),
    "num_train_epochs": 4,
    "learning_rate": 5e-4,
    "train_batch_size": 32,
    "max_length": 96,
    "output_dir": "outputs/demo",
}


def load_split(name: str) -> list[dict[str, Any]]:
    """Generate the pairs of one of `SPLITS`."""
    num_pairs, seed = SPLITS[name]
    return make_pairs(num_pairs, seed=seed)


def word_overlap(pair: dict[str, Any]) -> float:
    """Jaccard similarity of the sets of words of the two sentences, in lower case."""
    words = [
        {word.strip(".,") for word in pair[key].lower().split()}
        for key in ("sentence1", "sentence2")
    ]
    return len(words[0] & words[1]) / len(words[0] | words[1])


def _accuracy(guesses: Sequence[bool], pairs: Sequence[dict[str, Any]]) -> float:
    hits = sum(guess == bool(pair["label"]) for guess, pair in zip(guesses, pairs, strict=True))
    return hits / len(pairs)


def baselines() -> dict[str, float]:
    """Validation accuracy of the majority class and of the best overlap threshold."""
    train, validation = load_split("train"), load_split("validation")
    majority = 2 * sum(pair["label"] for pair in train) > len(train)
    train_overlaps = [word_overlap(pair) for pair in train]
    threshold = max(
        sorted(set(train_overlaps)),
        key=lambda least: _accuracy([overlap >= least for overlap in train_overlaps], train),
    )
    return {
        "majority": _accuracy([majority] * len(validation), validation),
        "overlap": _accuracy([word_overlap(pair) >= threshold for pair in validation], validation),
    }


def corpus_folder() -> Path:
    """The cache folder for this version of the corpus and these sizes."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    recipe = json.dumps([VERSION, SPLITS, POSITIVE_SHARE])
    return Path(cache) / "train_mrpc" / f"demo-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def write_corpus(folder: Path) -> Path:
    """Write train, validation and test as Parquet files into `folder` and return it.

    Each file is moved into place complete, so concurrent calls are safe. A file that already has
    the right bytes is left alone.
    """
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features(
        {
            "sentence1": Value("string"),
            "sentence2": Value("string"),
            "label": ClassLabel(names=list(LABELS)),
            "idx": Value("int32"),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        target = folder / f"{name}.parquet"
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
            new = Path(scratch) / target.name
            Dataset.from_list(load_split(name), features=features).to_parquet(new)
            if not (target.exists() and filecmp.cmp(new, target, shallow=False)):
                os.replace(new, target)
    return folder


def main() -> None:
    """Print a few pairs and the baselines of the docstring."""
    for pair in load_split("validation")[:8]:
        print(f"{LABELS[pair['label']]}\n  {pair['sentence1']}\n  {pair['sentence2']}")
    scores = baselines()
    print(f"majority class accuracy:              {scores['majority']:.4f}")
    print(f"best word-overlap threshold accuracy: {scores['overlap']:.4f}")


if __name__ == "__main__":
    main()
