"""Export the best model of a finished run for deployment, and compare it with the model.

    python -m lib.export outputs/mrpc                       into outputs/mrpc/onnx
    python -m lib.export outputs/mrpc --int8                into outputs/mrpc/onnx-int8
    python -m lib.export outputs/mrpc --format openvino     into outputs/mrpc/openvino

The graph takes any number of rows of any length. Its logits are compared with those of the model,
on validation rows of the run or on the rows of --file, each batch padded to its longest row.
"""

import argparse
import contextlib
import importlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lib.checkpoints import manifest
from lib.checkpoints.atomic import replacing, write_json
from lib.checkpoints.best_model import WEIGHTS_FILE
from lib.checkpoints.run_folder import read_config
from lib.data.checks import check_column_names, check_not_empty, check_texts
from lib.data.files.paths import expand
from lib.data.sources import RawSplit, read_splits
from lib.errors import InputError
from lib.report.finished_run import read_finished_run
from lib.tracking.progress import quiet_libraries
from lib.training.metrics import predictions_of

COMPARISON_FILE = "comparison.json"
NUM_ROWS = 1000  # to compare: a graph that differs shows on fewer
BATCH_SIZE = 32

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}

Batch = dict[str, torch.Tensor]
Array = NDArray[Any]


def main(arguments: Sequence[str]) -> int:
    """Export, print what was compared, and return the exit status: 2 for what cannot be used."""
    summary, _, _ = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m lib.export", description=summary)
    parser.add_argument(
        "folder", type=Path, metavar="OUTPUT_DIR", help="the --output_dir of a finished run"
    )
    parser.add_argument("--format", choices=list(PACKAGES), default="onnx")
    parser.add_argument(
        "--int8", action="store_true", help="int8 weights: ONNX Runtime's dynamic quantization"
    )
    parser.add_argument(
        "--file", type=Path, help="compare on the rows of this file; labels are not needed"
    )
    given = parser.parse_args(arguments)
    quiet_libraries()
    try:
        target, compared = export(given.folder, given.format, int8=given.int8, file=given.file)
    except InputError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(f"compared on {compared['num_rows']} rows of {compared['rows']}")
    print(f"largest difference of a logit: {compared['largest_difference']:.2g}")
    if compared["same_decisions"] is not None:
        print(f"same decision: {compared['same_decisions']} of {compared['num_rows']} rows")
    print(f"exported to {target}")
    return 0


def export(
    folder: Path, kind: str, *, int8: bool = False, file: Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """Export the model in an output folder into a folder of its own there.

    Args:
        kind: `onnx` or `openvino`.
        file: rows to compare on, instead of validation rows of the run.

    Returns:
        The folder of the export, and the content of its comparison.json.

    Raises:
        InputError: a package is missing, there is no finished run, or the rows cannot be used.
    """
    _check_packages(kind, int8=int8)
    run, config = read_finished_run(folder), read_config(folder)
    assert config is not None, "a finished run has its configuration"
    target = folder / (f"{kind}-int8" if int8 else kind)
    if target.exists() and not (target / COMPARISON_FILE).exists():
        raise InputError(f"{target} is in the way, and not an export: move it elsewhere")
    read = _read_rows(config, run.split, file)
    rows, where = read.rows, read.place
    check_not_empty(rows, where)
    check_column_names(rows, where, run.task.columns, None)
    check_texts(rows, where, run.task.columns, may_be_empty=True)
    rows = rows.select(range(min(len(rows), NUM_ROWS)))
    model, tokenizer = _load(folder)
    texts = [list(rows[column]) for column in run.task.columns]
    batches = list(_batches(tokenizer, texts, config["max_length"]))
    # Two rows: torch.export takes a dimension of size 1 for a constant.
    sample = _encode(tokenizer, [[column[0], column[-1]] for column in texts], config["max_length"])
    with replacing(target) as new:
        new.mkdir()
        with _quiet():
            _write_graph(model, sample, new, kind, int8=int8)
        tokenizer.save_pretrained(new)
        compared = {
            "format": kind,
            "int8": int8,
            "rows": str(where),
            "num_rows": len(rows),
            **_compare(model, _open_graph(new, kind), batches),
            "weights_sha256": manifest.sha256(folder / WEIGHTS_FILE),
            "versions": {
                name: version(name) for name in ("torch", "transformers", *PACKAGES[kind])
            },
        }
        write_json(new / COMPARISON_FILE, compared)
    return target, compared


def _check_packages(kind: str, *, int8: bool) -> None:
    missing = [name for name in PACKAGES[kind] if find_spec(name) is None]
    if missing:
        raise InputError(
            f"--format {kind} needs {', '.join(missing)}: pip install {' '.join(missing)}"
        )
    if int8 and kind != "onnx":
        raise InputError(f"--int8 is ONNX Runtime's: give it with --format onnx, not {kind}")
    if _exporters() is None and (int8 or kind != "onnx"):
        given = "--int8" if int8 else f"--format {kind}"
        raise InputError(
            f"{given} needs transformers 5.23, found {version('transformers')}: update it"
        )


def _exporters() -> Any:
    """Return the exporters of transformers; None where they are older than these formats."""
    exporters = importlib.import_module("transformers.exporters")
    return exporters if hasattr(exporters, "ExportedModel") else None


def _read_rows(config: Mapping[str, Any], split: str, file: Path | None) -> RawSplit:
    """Read the rows to compare on."""
    if file is not None:
        return read_splits({split: [str(path) for path in expand("--file", [str(file)])]}, None)[
            split
        ]
    given, name = config["validation_file"], config["dataset_name"]
    if given is not None and all(Path(path).exists() for path in given):
        return read_splits({split: given}, None)[split]
    if config["train_file"] is None and config["validation_share"] is config["folds"] is None:
        splits = read_splits(name, config["task_name"], revision=config["dataset_revision"])
        if split in splits:
            return splits[split]
    where = ", ".join(given or [name])
    raise InputError(
        f"the validation rows of the run are not there ({where}): compare on other rows with --file"
    )


def _load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model in fp32, whose operators every CPU has, and its tokenizer."""
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: the model cannot be loaded: {reason}") from error
    return model.eval(), tokenizer


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[list[str]], max_length: int
) -> Batch:
    """Tokenize the texts, a list for each column, as for training."""
    encoded = tokenizer(
        *texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt"
    )
    return dict(encoded)


def _batches(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[list[str]], max_length: int
) -> Iterator[Batch]:
    for start in range(0, len(texts[0]), BATCH_SIZE):
        part = [column[start : start + BATCH_SIZE] for column in texts]
        yield _encode(tokenizer, part, max_length)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters, which report each stage and each operator that they lack."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _write_graph(
    model: PreTrainedModel, inputs: Batch, folder: Path, kind: str, *, int8: bool
) -> None:
    """Trace the model on `inputs`, and write its graph with dynamic numbers of rows and tokens."""
    exporters = _exporters()
    if exporters is None:
        _write_with_torch(model, inputs, folder)
        return
    if kind == "openvino":
        exporter, config = exporters.OpenVINOExporter(), exporters.OpenVINOConfig(dynamic=True)
    else:
        dynamic = exporters.OnnxRuntimeDynamicConfig()
        quantizer = exporters.OnnxRuntimeQuantizer(dynamic) if int8 else None
        exporter = exporters.OnnxExporter()
        config = exporters.OnnxConfig(dynamic=True, quantizer=quantizer)
    exporter.export(model, inputs, config).save_pretrained(folder)


def _write_with_torch(model: PreTrainedModel, inputs: Batch, folder: Path) -> None:
    """Write the ONNX graph without the exporters that transformers 5.23 has."""
    automatic = torch.export.Dim.AUTO
    program = torch.onnx.export(
        model,
        kwargs=inputs,
        dynamic_shapes={name: {0: automatic, 1: automatic} for name in inputs},
        output_names=["logits"],
        dynamo=True,
    )
    assert program is not None, "torch's newer exporter returns a program"
    program.save(folder / "model.onnx", external_data=True)
    model.config.save_pretrained(folder)


def _open_graph(folder: Path, kind: str) -> Callable[[Batch], Array]:
    """Open an exported graph in its own runtime, on the CPU; it maps a batch to logits."""
    if kind == "onnx":
        import onnxruntime

        path, providers = folder / "model.onnx", ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(path, providers=providers)
        names = [taken.name for taken in session.get_inputs()]
        return lambda batch: session.run(["logits"], _arrays(batch, names))[0]
    import openvino

    # By default it computes in bf16 where the CPU can.
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", exact)
    names = [taken.any_name for taken in compiled.inputs]
    return lambda batch: compiled(_arrays(batch, names))["logits"]


def _arrays(batch: Batch, names: Sequence[str]) -> dict[str, Array]:
    """The inputs that a graph kept: it has none that the model does not use."""
    return {name: batch[name].numpy() for name in names}


@torch.no_grad()
def _compare(
    model: PreTrainedModel, graph: Callable[[Batch], Array], batches: Sequence[Batch]
) -> dict[str, Any]:
    """Compare logits, and the classes that they decide for; a regression has no classes."""
    expected = np.concatenate([model(**batch).logits.numpy() for batch in batches])
    found = np.concatenate([graph(batch) for batch in batches])
    same = None
    if expected.shape[1] > 1:
        same = int((predictions_of(found) == predictions_of(expected)).sum())
    largest = float(np.abs(found - expected).max())
    return {"largest_difference": largest, "same_decisions": same}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
