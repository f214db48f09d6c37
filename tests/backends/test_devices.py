"""What a device can do, and what the header of a run says about it."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DynamoBackend

from lib.backends import devices


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


@pytest.mark.parametrize(
    ("device", "processes", "threads", "leaves"),
    [("cuda", 8, 8, True), ("cpu", 1, 7, True), ("cpu", 2, 4, False), ("cpu", 2, 3, True)],
)
def test_whether_training_leaves_a_core(monkeypatch, device, processes, threads, leaves):
    """Of 8."""
    monkeypatch.setattr(devices, "num_cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=processes)
    assert devices.leaves_a_core(accelerator) is leaves


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
