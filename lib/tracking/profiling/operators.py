"""What took the time of traced updates: groups of operators, and the operators themselves."""

import bisect
import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch._C._autograd import DeviceType

# The ranges that `Profiler` marks; PyTorch marks those of the optimizer.
UPDATE, DATA, OPTIMIZER = "update", "waiting for data", "Optimizer."

# The first pattern that a name contains, in lower case. Operators of ATen, c10d and oneDNN, and
# kernels of cuBLAS (nvjet, xmma), CUTLASS, cuDNN, NCCL and Triton.
GROUPS = (
    ("collectives", r"nccl|gloo|c10d|fsdp"),
    ("compiled, fused operators", r"triton_(?!tem)"),
    ("attention", r"scaled_dot_product|flash|fmha|efficient_attention|softmax"),
    ("dropout's random numbers", r"dropout|bernoulli|rand|distribution_"),
    ("optimizer and gradient norm", r"adam|_foreach|vector_norm|multi_tensor|_amp_"),
    ("embeddings", r"embedding|index"),
    ("normalization", r"layer_?norm|batch_norm"),
    ("matrix products", r"mm\b|mm_|matmul|linear|gemm|cutlass|xmma|nvjet"),
    ("copies", r"copy|memcpy|memset|clone|contiguous|::cat\b|::_?to\b|_to_copy|fill|zero|empty"),
    (
        "elementwise operators",
        r"elementwise|::(add|sub|mul|div|where|ge|bitwise_not|gelu|tanh|relu)(_|\b)|gelu_back",
    ),
    ("sums", r"reduce|::(sum|mean|all|any)\b"),
)
OTHERS = "other operators"
HOST = "Python, autograd and waiting"
IDLE = "idle, waiting for the host"
# Not operators, but what calls them.
CALLERS = re.compile(r"^autograd::|Backward\d*$|^(Distributed|Torch-Compiled|ProfilerStep|## Call)")


@dataclasses.dataclass
class Times:
    """Microseconds in all updates, by group and by operator.

    On an accelerator these are the seconds of its kernels, and what calls them is not in them.

    Attributes:
        total: of the updates.
        data: in which the host fetched batches.
        by_operator: the group and the name of an operator, its microseconds and its calls.
    """

    num_updates: int
    num_optimizer_steps: int
    total: float
    data: float
    by_group: dict[str, float]
    by_operator: dict[tuple[str, str], tuple[float, int]]


def times_of(events: Iterable[Any], *, on_device: bool) -> Times:
    """Sum up the events of the host that lie in updates, and what ran between these does not count.

    Args:
        events: `FunctionEvent`s of PyTorch's profiler.
        on_device: count the kernels that the events launched, instead of the events.
    """
    hosts = [event for event in events if event.device_type == DeviceType.CPU]
    ranges = sorted(
        (event.time_range.start, event.time_range.end)
        for event in hosts
        if event.is_user_annotation and event.name == UPDATE
    )
    starts = [start for start, _ in ranges]
    annotations = {event.name for event in hosts if event.is_user_annotation}
    spent: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    data, num_optimizer_steps = 0.0, 0
    for event in hosts:
        place = bisect.bisect_right(starts, event.time_range.start) - 1
        if place < 0 or event.time_range.start > ranges[place][1]:
            continue
        data += event.cpu_time_total if event.name == DATA else 0.0
        num_optimizer_steps += event.name.startswith(f"{OPTIMIZER}step")
        found = _on_device(event, annotations) if on_device else _on_host(event)
        for group, name, microseconds in found:
            spent[group, name].append(microseconds)
    by_group: dict[str, float] = collections.defaultdict(float)
    for (group, _), times in spent.items():
        by_group[group] += sum(times)
    total = sum(end - start for start, end in ranges)
    # A device may still be busy when the host has left the update.
    total = max(total, sum(by_group.values()))
    by_group[IDLE if on_device else HOST] = total - sum(by_group.values())
    by_operator = {key: (sum(times), len(times)) for key, times in spent.items()}
    return Times(len(ranges), num_optimizer_steps, total, data, dict(by_group), by_operator)


def _on_host(event: Any) -> Iterator[tuple[str, str, float]]:
    """The group, name and microseconds of an event, without those of the events within it."""
    within = [event.name, *_callers(event)]
    if DATA in within:
        group = DATA
    elif any(name.startswith(OPTIMIZER) for name in within):
        group = group_of("adam")
    elif event.is_user_annotation or event.is_async or CALLERS.search(event.name):
        return  # what is left of the update in the end
    else:
        group = group_of(event.name)
    yield group, event.name, event.self_cpu_time_total


def _on_device(event: Any, annotations: set[str]) -> Iterator[tuple[str, str, float]]:
    """The same of the kernels that an event launched; some carry the names of annotations."""
    for kernel in event.kernels:
        if kernel.name in annotations:
            continue
        group = group_of(event.name)
        if any(name.startswith(OPTIMIZER) for name in (event.name, *_callers(event))):
            group = group_of("adam")
        yield group_of(kernel.name) if group == OTHERS else group, kernel.name, kernel.duration


def _callers(event: Any) -> Iterator[str]:
    while (event := event.cpu_parent) is not None:
        yield event.name


def group_of(name: str) -> str:
    """Return the group of an operator or kernel, from its name."""
    lower = name.lower()
    return next((group for group, names in GROUPS if re.search(names, lower)), OTHERS)


def dominating(times: Times, most: int = 4) -> str:
    """Return the groups that take most of the time, with their shares."""
    largest = sorted(times.by_group.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{group} {share(value, times.total)}" for group, value in largest)


def share(part: float, total: float) -> str:
    """A part as a percentage."""
    return f"{part / max(total, 1e-9):.0%}"


def table(times: Times, title: str, most: int = 40) -> str:
    """Return the groups and the operators that take most of the time, in Markdown."""
    updates = max(times.num_updates, 1)
    lines = [
        f"# {title}",
        "",
        f"An update took {times.total / updates / 1000:.2f} ms, of which the",
    ]
    lines += [f"host spent {times.data / updates / 1000:.2f} ms on fetching batches.", ""]
    lines += ["| group | ms per update | share |", "|---|---|---|"]
    for group, value in sorted(times.by_group.items(), key=lambda item: -item[1]):
        cells = (group, f"{value / updates / 1000:.3f}", share(value, times.total))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| operator or kernel | group | calls per update | ms per update | share |"]
    lines.append("|---|---|---|---|---|")
    largest = sorted(times.by_operator.items(), key=lambda item: -item[1][0])[:most]
    for (group, name), (value, calls) in largest:
        code = f"`{name[:80].replace('|', '/')}`"
        per_update = (f"{calls / updates:g}", f"{value / updates / 1000:.3f}")
        lines.append(f"| {' | '.join((code, group, *per_update, share(value, times.total)))} |")
    return "\n".join(lines) + "\n"
