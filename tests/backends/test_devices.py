"""What a device can do, and what the header of a run says about it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DynamoBackend
from transformers import AttentionMaskInterface, BertConfig, BertForSequenceClassification

from lib.backends import devices
from lib.training.meter import Meter
from lib.training.optimization import loss_sum


def test_no_fused_adamw_where_it_ignores_a_nan():
    """On Apple's MPS, `found_inf` would not stop an update that is not finite."""
    fused = {
        kind: devices.has_fused_adamw(torch.device(kind)) for kind in ("cpu", "cuda", "mps", "xla")
    }
    assert fused == {"cpu": True, "cuda": True, "mps": False, "xla": False}


@pytest.mark.parametrize(
    ("environment", "made", "said"),
    [
        ({}, {}, []),
        (
            {"ACCELERATE_USE_FSDP": "true"},
            {},
            ["FSDP needs accelerators: nothing is sharded (ACCELERATE_USE_FSDP has no effect)"],
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, {"distributed_type": "FSDP"}, []),
        (
            {},
            {"mixed_precision": "bf16"},
            ["T4 has no bf16: training in it is slower than in fp32"],
        ),
        (
            {},
            {"backend": DynamoBackend.INDUCTOR},
            ["Accelerate multiplies fp32 matrices in TF32 where it compiles the model"],
        ),
    ],
)
def test_says_how_a_run_falls_short(monkeypatch, environment, made, said):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    accelerator = SimpleNamespace(
        device=torch.device("cuda"),
        num_processes=1,
        distributed_type=made.get("distributed_type", "NO"),
        mixed_precision=made.get("mixed_precision", "no"),
        state=SimpleNamespace(
            dynamo_plugin=SimpleNamespace(backend=made.get("backend", DynamoBackend.NO))
        ),
    )
    assert devices.degradations(accelerator) == said


def test_names_the_cost_of_bf16_on_a_cpu_without_it(monkeypatch):
    monkeypatch.setattr(devices, "computes_in_bf16", lambda _: False)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=2,
        distributed_type="MULTI_CPU",
        mixed_precision="bf16",
        state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.NO)),
    )
    (line,) = devices.degradations(accelerator)
    assert line.endswith("training in it is slower than in fp32 (8 to 10 times on one with AVX2)")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_update_reads_nothing_from_the_device(attention, monkeypatch):
    """On PyTorch's meta device, which has no values: whatever asks for one raises."""
    masks = dict(AttentionMaskInterface._global_mapping)
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", masks)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=64, attn_implementation=attention)
    with torch.device("meta"):
        model = BertForSequenceClassification(config)
        batch = {name: torch.ones(4, 8, dtype=torch.int64) for name in ("input_ids", "labels")}
        batch["attention_mask"] = torch.ones(4, 8, dtype=torch.int64)
    labels = batch.pop("labels")[:, 0]
    with pytest.raises(RuntimeError, match="meta"):
        model(**batch)

    devices.build_every_mask()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.defaults["fused"] = True  # as on a GPU; a CPU's would undo the steps instead
    accelerator = SimpleNamespace(
        device=torch.device("meta"),
        scaler=None,
        distributed_type="NO",
        num_processes=1,
        state=SimpleNamespace(deepspeed_plugin=None),
        unwrap_model=lambda model, **_: model,
    )
    meter = Meter(accelerator, model, optimizer, str, 0.0)
    meter.start_update()
    loss = loss_sum(model(**batch).logits, labels)
    meter.add_loss(loss)
    (loss * 0.25).backward()
    meter.guard_update(1, 4, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    assert optimizer.found_inf.device.type == "meta"


@pytest.mark.parametrize(
    ("device", "processes", "threads", "leaves"),
    [("cuda", 8, 8, True), ("cpu", 1, 7, True), ("cpu", 2, 4, False), ("cpu", 2, 3, True)],
)
def test_whether_training_leaves_a_core(monkeypatch, device, processes, threads, leaves):
    """Of 8."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(devices, "num_cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=processes)
    assert devices.leaves_a_core(accelerator) is leaves
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # the others are on other machines
    assert devices.leaves_a_core(accelerator)


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_of_a_job(tmp_path, version):
    """The job may use 1000 bytes, and uses 800, of which 300 are cached files."""
    place = "slurm/job_7"
    if version == 1:
        line, folder = f"4:memory:/{place}/task_0", f"sys/fs/cgroup/memory/{place}"
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    else:
        line, folder = f"0::/{place}/task_0", f"sys/fs/cgroup/{place}"
        names = ("memory.max", "memory.current", "")
    limit, used, prefix = names
    written = {
        "proc/self/cgroup": f"9:cpuset:/elsewhere\n{line}\n",
        f"{folder}/{limit}": "1000\n",
        f"{folder}/{used}": "800\n",
        f"{folder}/memory.stat": f"{prefix}inactive_file 100\n{prefix}active_file 200\nrss 1\n",
        f"{folder}/task_0/{limit}": "max\n",
    }
    for name, content in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert min(devices._free_in_groups(tmp_path)) == 500


@pytest.mark.parametrize(
    ("vendor", "mkl", "parallel"),
    [("GenuineIntel", True, True), ("GenuineIntel", False, False), ("AuthenticAMD", True, False)],
)
def test_where_masks_are_drawn_in_parallel(monkeypatch, vendor, mkl, parallel):
    read = Path.read_text
    cpus = f"vendor_id\t: {vendor}\n"
    monkeypatch.setattr(
        Path, "read_text", lambda file: cpus if str(file) == "/proc/cpuinfo" else read(file)
    )
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(devices.platform, "processor", lambda: vendor)
    assert devices.draws_in_parallel() is parallel
