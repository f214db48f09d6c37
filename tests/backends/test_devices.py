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
    assert line.endswith("has no bf16: training in it is 8 to 10 times slower than in fp32")
