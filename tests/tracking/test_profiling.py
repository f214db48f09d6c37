"""--profile: what is traced, that training does not notice, and how the time is divided."""

import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import assert_same_run, last_update, read_weights
from runs import difference, run, run_until
from torch._C._autograd import DeviceType

from lib.errors import InputError
from lib.tracking.profiling import profiler
from lib.tracking.profiling.operators import dominating, group_of, times_of


def events_of(path):
    return [event["name"] for event in json.loads(path.read_text())["traceEvents"]]


def files(folder):
    return sorted(path.name for path in (folder / "profile").glob("*"))


def test_traces_the_updates_asked_for_and_keeps_the_bits(
    two_epochs, checkpointed, tmp_path, capsys
):
    run(two_epochs, tmp_path, "--checkpointing_steps=1", "--profile=2")
    assert_same_run(tmp_path, checkpointed, "step_14")
    assert files(tmp_path) == ["updates_11_to_12.md", "updates_11_to_12.rank_0.json"]
    names = events_of(tmp_path / "profile" / "updates_11_to_12.rank_0.json")
    assert names.count("Optimizer.step#AdamW.step") == 2
    assert names.count("update") == 2
    assert names.count("aten::nll_loss_forward") == 4  # two micro-batches
    table = (tmp_path / "profile" / "updates_11_to_12.md").read_text()
    assert "matrix products" in table
    # For the weights with decay, and for those without.
    assert "| `aten::_fused_adamw_` | optimizer and gradient norm | 2 |" in table
    assert "profile of updates 11 to 12: " in capsys.readouterr().out


def test_a_stopped_trace_leaves_nothing_and_the_resumed_run_traces_its_own(
    two_epochs, checkpointed, tmp_path, capsys
):
    """Stopped before update 13 of 14, as the third of four is traced; then 14 is, and then none."""
    flags = [*two_epochs, "--profile=4"]
    run_until(flags, tmp_path, 1 + 2 * 12 + 3)
    assert not (tmp_path / "profile").exists()
    run(flags, tmp_path, "--checkpointing_steps=1")
    assert_same_run(tmp_path, checkpointed, "step_14")
    before = files(tmp_path)
    assert before == ["updates_14_to_14.md", "updates_14_to_14.rank_0.json"]
    capsys.readouterr()
    run(flags, tmp_path)
    assert "too few updates are left" in capsys.readouterr().out
    assert files(tmp_path) == before


def test_a_trace_that_cannot_be_written_does_not_end_the_run(flags, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise InputError("no space left")

    monkeypatch.setattr(profiler, "write_text", full)
    assert run(flags, tmp_path, "--profile=2")["num_updates"] == 7
    assert "--profile: rank 0 goes on without its trace: no space left" in capsys.readouterr().err


def test_training_that_ends_sooner_leaves_what_was_traced(flags, tmp_path, capsys):
    """The evaluation that stops the run comes while it is traced, from update 2 on."""
    run(flags, tmp_path, "--profile=6", "--eval_every=2", "--early_stopping_patience=1")
    assert "stopped early" in capsys.readouterr().out
    last = last_update(tmp_path)
    trace = tmp_path / "profile" / f"updates_2_to_{last}.rank_0.json"
    assert events_of(trace).count("Optimizer.step#AdamW.step") == last - 1 < 6


def test_an_earlier_trace_is_kept_and_another_run_removes_it(flags, once, tmp_path, capsys):
    run(flags, tmp_path, "--profile=2")
    trace = tmp_path / "profile" / "updates_6_to_7.rank_0.json"
    before = trace.read_bytes()
    shutil.rmtree(tmp_path / "epoch_0")
    (tmp_path / "status.json").write_text('{"status": "running", "update": 0}')
    run(flags, tmp_path, "--profile=2")
    assert "is there already" in capsys.readouterr().out
    assert trace.read_bytes() == before
    run(flags, tmp_path, "--overwrite_output_dir")
    assert not trace.exists()
    assert difference(read_weights(tmp_path), read_weights(once)) == 0


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::bmm", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("nvjet_hsh_128x128_64x4_1x2_h_bz_TNN", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "matrix products"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::bernoulli_", "dropout's random numbers"),
        ("aten::random_", "dropout's random numbers"),
        ("aten::native_dropout", "dropout's random numbers"),
        ("triton_per_fused_add_native_dropout_native_layer_norm_3", "compiled, fused operators"),
        ("aten::_fused_adamw_", "optimizer and gradient norm"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "collectives"),
        ("gloo:all_reduce", "collectives"),
        ("aten::native_layer_norm_backward", "normalization"),
        ("aten::embedding_dense_backward", "embeddings"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("aten::mul_", "elementwise operators"),
        ("aten::ge", "elementwise operators"),
        ("aten::sum", "sums"),
        ("aten::view", "other operators"),
    ],
)
def test_groups(name, group):
    assert group_of(name) == group


def event(name, start, end, *, within=None, own=None, kernels=(), annotation=False):
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        cpu_time_total=end - start,
        self_cpu_time_total=end - start if own is None else own,
        cpu_parent=within,
        kernels=[SimpleNamespace(name=kernel, duration=time) for kernel, time in kernels],
        is_user_annotation=annotation,
        is_async=False,
        device_type=DeviceType.CPU,
    )


@pytest.fixture
def two_updates():
    """Updates of 100 and 60 us, and an evaluation between them."""
    updates = [event("update", 0, 100, annotation=True), event("update", 200, 260, annotation=True)]
    step = event("Optimizer.step#AdamW.step", 60, 80, within=updates[0], own=5, annotation=True)
    return [
        *updates,
        event("waiting for data", 0, 10, within=updates[0], own=10, annotation=True),
        event("aten::mm", 10, 50, kernels=[("gemm", 20)]),
        step,
        event("aten::mul_", 62, 77, within=step, kernels=[("vectorized", 4), ("update", 50)]),
        event("aten::mm", 120, 180, kernels=[("gemm", 60)]),
        event("autograd::engine::evaluate_function: MmBackward0", 205, 225, own=2),
        event("aten::mm", 207, 225, kernels=[("gemm", 30)]),
        event("Torch-Compiled Region", 230, 250, own=3, kernels=[("triton_poi_fused_add", 6)]),
    ]


def test_the_time_of_the_host(two_updates):
    times = times_of(two_updates, on_device=False)
    assert (times.num_updates, times.num_optimizer_steps, times.total, times.data) == (
        2,
        1,
        160,
        10,
    )
    assert times.by_group == {
        "waiting for data": 10,
        "matrix products": 40 + 18,
        "optimizer and gradient norm": 5 + 15,
        "Python, autograd and waiting": 160 - 10 - 58 - 20,
    }
    assert dominating(times, 2) == "Python, autograd and waiting 45%, matrix products 36%"


def test_the_time_of_a_device_is_that_of_its_kernels(two_updates):
    """A kernel with the name of an annotation is the annotation, as the device shows it."""
    times = times_of(two_updates, on_device=True)
    assert times.by_group == {
        "matrix products": 20 + 30,
        "optimizer and gradient norm": 4,
        "compiled, fused operators": 6,
        "idle, waiting for the host": 160 - 60,
    }
    assert times.by_operator["matrix products", "gemm"] == (50, 2)


def test_a_device_that_is_busy_for_longer_than_the_host_is_not_idle():
    update = event("update", 0, 10, annotation=True)
    times = times_of([update, event("aten::mm", 1, 2, kernels=[("gemm", 40)])], on_device=True)
    assert (times.total, times.by_group["idle, waiting for the host"]) == (40, 0)
