"""Measure on one GPU how fast the training is, in less than eight minutes.

    python -m benchmarks.gpu                   prints a table, line by line
    python -m benchmarks.gpu --json gpu.json   also writes it as JSON
    python -m benchmarks.gpu --toy             a tiny model, as on a machine without a GPU

Random weights of the size of BERT-base, pairs of the lengths of MRPC, bf16, 32 rows an update;
nothing is downloaded. `train_mrpc.py` alternates with `plain_loop.py`, and runs once compiled, with
CUDA graphs. Whether the results are right is the subject of `gpu_check.py`.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from benchmarks.gpu_check import WARM_UP_UPDATES, Failed, listed, start
from lib.demo.corpus import MODEL_DIR
from lib.model.flops import training_flops
from lib.model.layers import shorten_last

ROOT = Path(__file__).parent.parent

# Tokens of MRPC's training pairs by BERT's tokenizer: mean, standard deviation, shortest, longest.
LENGTHS = (53, 13, 19, 103)
BATCH_SIZE = 32
# Compiling BERT-base for four lengths of a training, and one of an evaluation, takes minutes.
SECONDS_TO_COMPILE = 270.0


@dataclasses.dataclass
class Bench:
    """What the parts share.

    Attributes:
        folder: for the model, the pairs and the runs.
        toy: a tiny model, and few rows.
        pairs: how often the script and the plain loop alternate.
        deadline: by `time.monotonic`; no part starts a run that might end later.
        figures: what the parts measured.
    """

    folder: Path
    toy: bool
    pairs: int
    deadline: float
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def precision(self) -> str:
        return "no" if self.toy else "bf16"

    @property
    def num_updates(self) -> int:
        """Of a run; the first third is its warm-up."""
        return 12 if self.toy else 345

    def launch(self, module: str, *flags: str, dynamo: str = "no", seconds: float = 90.0) -> str:
        """Run a module on one device, through Accelerate's launcher; return what it printed.

        Raises:
            Failed: it did not finish, or there is not enough time left.
        """
        left = self.deadline - time.monotonic()
        if left < seconds / 2:
            raise Failed(f"left out: {left:.0f} s are left")
        launcher = [
            "accelerate.commands.launch",
            f"--config_file={ROOT / 'accelerate_configs' / 'single_gpu.yaml'}",
            f"--mixed_precision={self.precision}",
            f"--dynamo_backend={dynamo}",
            # Not set to dynamic: a graph for each of the few lengths.
            "--dynamo_mode=reduce-overhead",
        ]
        status, printed = start([*launcher, "-m", module, *flags], min(seconds, left))
        if status != 0:
            lines = [line for line in printed.splitlines() if "rror" in line] or [f"exit {status}"]
            raise Failed(lines[0].strip()[:200])
        return printed

    def train(self, name: str, *, count_syncs: bool = False, **options: Any) -> dict[str, Any]:
        """Run the script; return its speed after the warm-up, and what `gpu_check` saw of it."""
        folder, report = self.folder / name, self.folder / f"{name}.json"
        watched = {"report": str(report), "count_syncs": count_syncs}
        self.launch(
            "benchmarks.gpu_check",
            "--watch",
            json.dumps(watched),
            f"--dataset_name={self.folder / 'pairs'}",
            f"--model_name_or_path={self.folder / 'model'}",
            f"--train_batch_size={BATCH_SIZE}",
            "--max_length=128",
            "--report_to=none",
            f"--max_train_steps={self.num_updates}",
            f"--eval_every={self.num_updates}",
            f"--checkpointing_steps={10 * self.num_updates}",
            f"--logging_steps={self.num_updates // 12}",
            f"--output_dir={folder}",
            **options,
        )
        written = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        lines = [line for line in written if "loss" in line][4:]
        speed = {
            name: statistics.median(line[f"{name}_per_second"] for line in lines)
            for name in ("examples", "tokens")
        }
        return {**speed, **json.loads(report.read_text())}

    def train_plainly(self) -> dict[str, float]:
        """Run the plain loop; return its speed after the warm-up."""
        printed = self.launch(
            "benchmarks.plain_loop",
            f"--dataset_name={self.folder / 'pairs'}",
            f"--model_name_or_path={self.folder / 'model'}",
            f"--train_batch_size={BATCH_SIZE}",
            f"--warm_up={self.num_updates // 9}",
        )
        measured = json.loads(printed.strip().splitlines()[-1])
        return {name: measured[name] / measured["seconds"] for name in ("rows", "tokens")}


def prepare(bench: Bench) -> None:
    """Write a model with random weights, and pairs of words that are one token each."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = _random_model(bench)
    model.bert.save_pretrained(bench.folder / "model")
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(bench.folder / "model")
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 2)
    generator = np.random.default_rng(0)
    (bench.folder / "pairs").mkdir()
    num_train = 128 if bench.toy else 3668
    for split, num_rows in (("train", num_train), ("validation", BATCH_SIZE), ("test", 1)):
        mean, deviation, low, high = LENGTHS
        quantiles = statistics.NormalDist(mean, deviation).quantiles(num_rows + 1)
        lengths = np.clip(np.rint(generator.permutation(quantiles)), low, high).astype(int)
        lines = []
        for row, length in enumerate((lengths - 3).tolist()):  # [CLS], and [SEP] twice
            text = generator.choice(words, length).tolist()
            first, second = text[: length // 2], text[length // 2 :]
            pair = {"sentence1": " ".join(first), "sentence2": " ".join(second)}
            lines.append(json.dumps(pair | {"label": row % 2, "idx": row}))
        (bench.folder / "pairs" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def _random_model(bench: Bench) -> BertForSequenceClassification:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**(sizes | {"intermediate_size": 64} if bench.toy else {}))
    return BertForSequenceClassification(config)


# The parts: each yields lines of the table as it measures them


def measure_matrix_rate(bench: Bench) -> Iterator[tuple[str, str]]:
    """The rate of matrix products: of large ones, and of those of an encoder layer of BERT-base."""
    size, rows = (256, 64) if bench.toy else (8192, BATCH_SIZE * LENGTHS[0])
    dtype = torch.float32 if bench.toy else torch.bfloat16
    large = _rate(bench, dtype, [(size, size, size)])
    yield "matrix products of 8,192 rows" if not bench.toy else "matrix products", _tera(large)
    # Query, key, value and output; and the two of the feed-forward network.
    layer = [(rows, 768, 768)] * 4 + [(rows, 768, 3072), (rows, 3072, 768)]
    bench.figures["matrix_rate"] = _rate(bench, dtype, layer)
    yield f"those of a layer, {rows} tokens", _tera(bench.figures["matrix_rate"])


def _rate(bench: Bench, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]]) -> float:
    """Floating-point operations per second of products (m, k) x (k, n), without their launches."""
    inputs = [
        (
            torch.randn(m, k, dtype=dtype, device=bench.device),
            torch.randn(k, n, dtype=dtype, device=bench.device),
        )
        for m, k, n in shapes
    ]

    def multiply() -> None:
        for first, second in inputs:
            torch.mm(first, second)

    if bench.device.type == "cuda":
        from triton.testing import do_bench_cudagraph

        with torch.no_grad():
            seconds = do_bench_cudagraph(multiply, rep=100) / 1000
    else:
        seconds = _seconds(multiply)
    return sum(2 * m * k * n for m, k, n in shapes) / seconds


def _seconds(work: Callable[[], object]) -> float:
    """Seconds of one call, the best of five repetitions."""
    timer = timeit.Timer(work)
    number, _ = timer.autorange()
    return min(timer.repeat(5, number)) / number


def _tera(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s"


def measure_seeds(bench: Bench) -> Iterator[tuple[str, str]]:
    """What seeding the dropout of a micro-batch costs the host, and whether it synchronizes."""
    from accelerate.utils import set_seed

    from lib.data.batching import dropout_seed

    torch.zeros((), device=bench.device)
    cost = _seconds(lambda: set_seed(dropout_seed(42, 7, 0, 0)))
    bench.figures["seconds_of_a_seed"] = cost
    yield "seeding the dropout of a micro-batch", f"{cost * 1e6:.0f} us of the host"
    if bench.device.type != "cuda":
        yield "that it does not synchronize", "not here: no GPU"
        yield "that a CUDA graph reads a new seed", "not here: no GPU"
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        set_seed(dropout_seed(42, 7, 1, 0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    yield "that it does not synchronize", "holds"
    yield "that a CUDA graph reads a new seed", "holds" if _graph_reads_seeds() else "FAILS"


def _graph_reads_seeds() -> bool:
    """True if a replayed graph draws anew from a new seed, and the same from the same seed.

    Source: `CUDAGeneratorState::replay_prologue` copies the seed to the graph's memory.
    """
    graph, ones = torch.cuda.CUDAGraph(), torch.ones(10_000, device="cuda")
    with torch.cuda.graph(graph):
        dropped = torch.nn.functional.dropout(ones)
    masks = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        graph.replay()
        masks.append(dropped.clone())
    return not masks[0].equal(masks[1]) and masks[0].equal(masks[2])


def measure_eager(bench: Bench) -> Iterator[tuple[str, str]]:
    """The script and the plain loop, alternating."""
    ours, plain = [], []
    for number in range(bench.pairs):
        try:
            ours.append(bench.train(f"eager_{number}"))
            plain.append(bench.train_plainly())
        except Failed as failure:
            if len(plain) == 0:
                raise
            yield f"pair {number + 1}", str(failure)
            break
        figures = f"{ours[-1]['examples']:.1f} and {plain[-1]['rows']:.1f} examples/s"
        yield f"pair {number + 1}: train_mrpc.py, plain loop", figures
    pairs = list(zip(ours, plain, strict=False))
    bench.figures["plain"] = statistics.median(other["rows"] for _, other in pairs)
    eager = statistics.median(one["examples"] for one, _ in pairs)
    ratios = [one["examples"] / other["rows"] for one, other in pairs]
    yield (
        f"train_mrpc.py, median of {len(pairs)}",
        f"{eager:.1f} examples/s, {_median_and_range(ratios)} x the plain loop",
    )
    tokens = statistics.median(one["tokens"] for one, _ in pairs)
    yield "train_mrpc.py, of the matrix rate", _share_of_rate(bench, tokens)
    if "seconds_of_a_seed" in bench.figures:
        share = bench.figures["seconds_of_a_seed"] * eager / BATCH_SIZE
        yield "the seed's share in an update", f"{share:.2%}"


def _median_and_range(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _share_of_rate(bench: Bench, tokens_per_second: float) -> str:
    """The operations of a training on real tokens, over those of matrix products in that time."""
    if "matrix_rate" not in bench.figures:
        return "unknown: it could not be measured"
    with torch.device("meta"):
        model = _random_model(bench)
    shorten_last(model)
    flops = training_flops(model)
    assert flops is not None, "known for BERT"
    operations = flops.linear + flops.square * LENGTHS[0]
    return f"{operations * tokens_per_second / bench.figures['matrix_rate']:.1%}"


def count_syncs(bench: Bench) -> Iterator[tuple[str, str]]:
    """Operations between two lines of the log for which the host waits for the GPU."""
    if bench.device.type != "cuda":
        yield "host synchronizations", "not here: no GPU"
        return
    yield "host synchronizations", _syncs(bench.train("counted", count_syncs=True))


def _syncs(seen: dict[str, Any]) -> str:
    found = seen["syncs"] | seen["syncs_in_model"]
    places = f": {listed(found)}" if found else ""
    return f"{sum(found.values())} in {seen['updates'] - WARM_UP_UPDATES} updates{places}"


def measure_compiled(bench: Bench) -> Iterator[tuple[str, str]]:
    """The script compiled, with CUDA graphs; the host synchronizations are counted beside."""
    on_gpu = bench.device.type == "cuda"
    compiled = bench.train(
        "compiled",
        dynamo="inductor" if on_gpu else "eager",
        seconds=SECONDS_TO_COMPILE,
        count_syncs=on_gpu,
    )
    figure = f"{compiled['examples']:.1f} examples/s"
    if "plain" in bench.figures:
        figure += f", {compiled['examples'] / bench.figures['plain']:.2f} x the plain loop"
    yield "train_mrpc.py, compiled", f"{figure}; {compiled['graphs'][-1]} graphs"
    yield "compiled, of the matrix rate", _share_of_rate(bench, compiled["tokens"])
    yield "compiled, host synchronizations", _syncs(compiled) if on_gpu else "not here: no GPU"


PARTS: dict[str, Callable[[Bench], Iterator[tuple[str, str]]]] = {
    "matrix": measure_matrix_rate,
    "seeds": measure_seeds,
    "eager": measure_eager,
    "syncs": count_syncs,
    "compiled": measure_compiled,
}
WITH_RUNS = ("eager", "syncs", "compiled")


def main(flags: Sequence[str]) -> int:
    """Print the table, and return the exit status: 1 if a part gave no figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the table too")
    parser.add_argument("--toy", action="store_true", help="a tiny model, as without a GPU")
    parser.add_argument("--pairs", type=int, default=3, help="of the script and the plain loop")
    parser.add_argument("--minutes", type=float, default=7.5, help="in which it ends")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some parts")
    arguments = parser.parse_args(flags)
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{device}, torch {torch.__version__}")
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        deadline = time.monotonic() + 60 * arguments.minutes
        bench = Bench(Path(folder), arguments.toy or not on_gpu, arguments.pairs, deadline)
        if set(arguments.only) & set(WITH_RUNS):
            prepare(bench)
        for part in arguments.only:
            try:
                for name, figure in PARTS[part](bench):
                    print(f"{name:<44}{figure}", flush=True)
                    rows.append({"what": name, "figure": figure})
            # A part that cannot be measured must not take the others with it.
            except Exception as error:
                failed = True
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"{part:<44}{reason}", flush=True)
                rows.append({"what": part, "figure": reason})
    if arguments.json:
        table = {"device": device, "torch": torch.__version__, "rows": rows}
        arguments.json.write_text(json.dumps(table, indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
