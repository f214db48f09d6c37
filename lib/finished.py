"""Recognize a run that is finished, so that its command, given again, does nothing.

Imports nothing heavy: neither PyTorch nor the data are needed to know.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError

if TYPE_CHECKING:  # slow
    from lib.report.finished_run import FinishedRun

# Flags whose value the first start of a run chooses where none is given.
CHOSEN_ONCE = ("model_revision", "dataset_revision")

# What the folder of a finished run holds beside its predictions and the files that
# `read_finished_run` reads.
FILES = ("config.json", "tokenizer_config.json", "README.md", "report/index.html")


def finished_lines(
    config: Mapping[str, Any], precision: str | None, sources: Iterable[Path]
) -> list[str] | None:
    """Return what to print of a run that is finished; None if there may be something to do.

    There is, where a flag is another one, also one that a resumed run may change, and where
    something in the output folder is damaged or missing.

    Args:
        config: as config.yaml has it, with the choices that do not need the hub.
        precision: that Accelerate was asked for; None if any will do.
        sources: files and folders of rows. One that changed after the run started is to be read.
    """
    # YAML and NumPy: a bad flag or --help should not wait for them.
    from lib.checkpoints import manifest
    from lib.checkpoints.run_folder import CONFIG_FILE, HELD_OUT_FILE, read_config, read_status
    from lib.report.finished_run import final_lines, read_finished_run

    folder = Path(config["output_dir"])
    if read_status(folder).get("status") != "finished":
        return None
    try:
        before = read_config(folder) or {}
        run = read_finished_run(folder)
        complete = all((folder / name).is_file() for name in (*FILES, *_predictions(run)))
        if before.get("validation_share") or before.get("folds"):
            complete = complete and (folder / HELD_OUT_FILE).is_file()
        if not (complete and _is_whole(folder / "model.safetensors")):
            return None
        read = (folder / CONFIG_FILE).stat().st_mtime
        # ctime: a file that was copied or moved here may keep an older mtime.
        changed = any(path.stat().st_ctime > read for path in sources)
    except (InputError, OSError):
        return None
    left_over = config["save_only_model"] and manifest.owned(folder)
    if precision is None:
        config = {**config, "mixed_precision": before.get("mixed_precision")}
    same = _same(before, config) and precision in (None, run.provenance["precision"])
    if changed or left_over or not same:
        return None
    return [
        f"{folder} holds this run, finished at update {run.num_updates}: nothing to do "
        "(--overwrite_output_dir trains anew)",
        *final_lines(folder, run.task, run.scores, run.best_update),
    ]


def _predictions(run: "FinishedRun") -> Iterator[str]:
    """Yield the files of the predictions for every split, and those for gluebenchmark.com."""
    splits = run.provenance["num_rows"].keys() - {"train"}
    for split in splits:
        yield f"predictions/{split}.jsonl"
    for split, name in zip(run.task.test, run.task.submissions, strict=False):
        if split in splits:
            yield f"predictions/{name}"


def _same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """True if every flag has the value that the finished run had."""
    return before.keys() == now.keys() and all(
        value == before[name] or (value is None and name in CHOSEN_ONCE) or name == "output_dir"
        for name, value in now.items()
    )


def _is_whole(path: Path) -> bool:
    """True if a file of weights is as long as its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return True
    except (SafetensorError, OSError):
        return False
