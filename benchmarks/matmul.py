"""How near an update on CPUs comes to the rate at which they multiply matrices, and why not nearer.

    python -m benchmarks.matmul --plot docs/update_time.png

First the rate of the products of a BERT layer, forward and backward, by hidden size and tokens of a
micro-batch. Then an update of 16 rows of 64 tokens, with random weights and dropout of 0.1, by the
script's layers and optimizer, with the system's own settings of threads and memory: its
floating-point operations, counted by PyTorch, over its seconds as a share of that rate, and where
its profiler finds the time. The last line is the same as JSON.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

from lib.model import dropout
from lib.model.layers import shorten_last
from lib.training.optimization import loss_sum, parameter_groups

ROWS, ROW_TOKENS = 16, 64
HEAD_SIZE = 32  # MiniLM's
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Operators of PyTorch by how their names begin; the first group that fits. The picture stacks them
# in this order.
GROUPS = {
    "matrix products": ("addmm", "mm", "bmm", "baddbmm", "linear", "mkldnn_linear"),
    "random numbers": ("random_", "bernoulli_"),  # of dropout
    "GELU, softmax, layer norm": (
        *("gelu", "_softmax", "native_layer_norm", "tanh"),
        *("all", "isneginf", "where"),  # of SDPA's softmax, for rows without a token
    ),
    "embeddings": ("embedding", "index_select"),
    "copies, casts and fills": ("copy_", "_to_copy", "clone", "cat", "fill_", "zero_"),
    "AdamW and clipping": ("_fused_adamw_", "_foreach_", "linalg_vector_norm"),
    "sums and products by element": ("add", "mul", "div", "sum", "ge"),  # also of dropout
}
REST = "the rest, Python too"


def clock() -> float:
    """Seconds; those of the processor where one thread works, whatever else the machine does."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Return the median time of `work`, after one call that does not count."""
    work()
    seconds = []
    for _ in range(repeats):
        started = clock()
        work()
        seconds.append(clock() - started)
    return statistics.median(seconds)


def matrix_rate(hidden: int, tokens: int, dtype: torch.dtype, repeats: int) -> float:
    """Return the FLOP/s of the linear layers of a BERT layer: forward, and both gradients.

    Four are (hidden, hidden), and one each leads to 4 x hidden and back.
    """
    flops = seconds = 0.0
    for inputs, outputs, count in (
        (hidden, hidden, 4),
        (hidden, 4 * hidden, 1),
        (4 * hidden, hidden, 1),
    ):
        x, y = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, outputs).to(dtype)
        weight, bias = torch.randn(outputs, inputs).to(dtype), torch.zeros(outputs).to(dtype)

        def products(x: Tensor = x, y: Tensor = y, w: Tensor = weight, b: Tensor = bias) -> None:
            torch.nn.functional.linear(x, w, b)
            torch.mm(y, w)
            torch.mm(y.t(), x)

        flops += count * 3 * 2 * tokens * inputs * outputs
        seconds += count * median_seconds(products, repeats)
    return flops / seconds


def make_update(
    hidden: int,
    num_layers: int,
    dtype: torch.dtype,
    configure: Callable[[BertForSequenceClassification], None],
) -> Callable[[], None]:
    """Return a function that does one update of a BERT with random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // HEAD_SIZE,
        intermediate_size=4 * hidden,
    )
    model = BertForSequenceClassification(config).train()
    configure(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-4, fused=True)
    ids = torch.randint(1000, 20_000, (ROWS, ROW_TOKENS))
    mask, labels = torch.ones_like(ids), torch.randint(0, 2, (ROWS,))

    def update() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=mask).logits
        (loss_sum(logits, labels) / ROWS).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def group_of(operator: str) -> str:
    """Return the group of an operator of PyTorch, or of its gradient."""
    name = operator.removeprefix("aten::")
    return next((group for group, begins in GROUPS.items() if name.startswith(begins)), REST)


def seconds_by_group(update: Callable[[], None], seconds: float, repeats: int) -> dict[str, float]:
    """Divide the seconds of an update among the groups, as under the profiler, which slows it."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        for _ in range(repeats):
            update()
        whole = time.perf_counter() - started
    groups = dict.fromkeys([*GROUPS, REST], 0.0)
    for event in profiled.key_averages():
        if event.key.startswith("aten::"):
            groups[group_of(event.key)] += event.self_cpu_time_total / 1e6
    groups[REST] += whole - sum(groups.values())
    return {group: spent * seconds / whole for group, spent in groups.items()}


def measure_update(
    hidden: int,
    layers: int,
    precision: str,
    repeats: int,
    configure: Callable[[BertForSequenceClassification], None],
) -> dict[str, Any]:
    """Return what an update computes, how long it takes, and where."""
    update = make_update(hidden, layers, DTYPES[precision], configure)
    with FlopCounterMode(display=False) as counter:
        update()
    seconds = median_seconds(update, repeats)
    rate = matrix_rate(hidden, ROWS * ROW_TOKENS, DTYPES[precision], repeats)
    return {
        "hidden": hidden,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "flops": counter.get_total_flops(),
        "matrix_rate": rate,
        "share": counter.get_total_flops() / seconds / rate,
        "groups": seconds_by_group(update, seconds, repeats),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def rate_rows(
    hidden: Sequence[int], tokens: Sequence[int], threads: Sequence[int], repeats: int
) -> list[list[str]]:
    rows = []
    for size, count, num_threads in itertools.product(hidden, tokens, threads):
        torch.set_num_threads(num_threads)
        rates = [matrix_rate(size, count, dtype, repeats) / 1e9 for dtype in DTYPES.values()]
        rows.append([str(size), str(count), str(num_threads), *(f"{rate:.0f}" for rate in rates)])
    return rows


def update_rows(updates: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            f"{update['hidden']}, {update['precision']}, {update['threads']}",
            f"{update['seconds'] * 1e3:.0f}",
            f"{ROWS / update['seconds']:.1f}",
            f"{update['flops'] / update['seconds'] / 1e9:.0f}",
            f"{update['share']:.0%}",
            *(f"{spent / update['seconds']:.0%}" for spent in update["groups"].values()),
        ]
        for update in updates
    ]


def draw(updates: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a bar for each update: its groups from below, and what its products would take."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    names = [
        f"{of['precision']}, {of['threads']} thread{'s'[: of['threads'] > 1]}" for of in updates
    ]
    left = [0.0] * len(updates)
    colors = pyplot.get_cmap("tab10")
    for number, group in enumerate([*GROUPS, REST]):
        widths = [of["groups"][group] * 1e3 for of in updates]
        axes.barh(names, widths, left=left, label=group, color=colors(number))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for number, of in enumerate(updates):
        ideal = of["flops"] / of["matrix_rate"] * 1e3
        axes.plot([ideal, ideal], [number - 0.4, number + 0.4], color="black", linewidth=2)
    axes.plot([], [], color="black", linewidth=2, label="its products at the matrix rate")
    axes.invert_yaxis()
    axes.set(xlabel=f"ms of an update of {ROWS} rows of {ROW_TOKENS} tokens")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--layers", type=int, default=6, help="of the BERT that is updated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--torch_dropout", action="store_true", help="instead of that of lib/model/dropout.py"
    )
    parser.add_argument(
        "--whole_last_layer", action="store_true", help="not for the first token alone"
    )
    parser.add_argument("--plot", type=Path, help="draw the updates of the first hidden size")
    given = parser.parse_args(arguments)

    def configure(model: BertForSequenceClassification) -> None:
        if not given.whole_last_layer:
            shorten_last(model)
        if not given.torch_dropout:
            dropout.configure(Accelerator(cpu=True), model)

    rates = rate_rows(given.hidden, given.tokens, given.threads, given.repeats)
    print(table(["hidden", "tokens", "threads", "fp32, GFLOP/s", "bf16, GFLOP/s"], rates), "\n")
    updates = []
    for precision, threads in itertools.product(DTYPES, given.threads):
        torch.set_num_threads(threads)
        model = (given.hidden[0], given.layers, precision)
        updates.append(measure_update(*model, given.repeats, configure))
    head = ["hidden, precision, threads", "ms", "examples/s", "GFLOP/s", "of the matrix rate"]
    print(table([*head, *GROUPS, REST], update_rows(updates)), "\n")
    print(json.dumps(updates))
    if given.plot:
        draw(updates, given.plot)


if __name__ == "__main__":
    main()
