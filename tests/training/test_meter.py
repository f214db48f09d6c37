"""What a run costs: FLOPs and memory."""

import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from models import load

from lib.backends import devices
from lib.model.flops import RowFlops
from lib.training.meter import Meter, Speed


def test_flops_by_hand(monkeypatch):
    seconds = iter([0.0, 1.0, 3.0, 3.0, 5.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    # 3e9 T + 1e9 T^2 FLOPs for a row of T tokens, on devices of 50 TFLOP/s together.
    speed = Speed(0.0, RowFlops(3e9, 1e9), 50.0)
    speed.start()  # at 0 s
    speed.add(2, 30, 20**2 + 10**2)  # the first update is done after 1 s
    figures = speed.read()  # at 3 s; and goes on
    assert figures["model_tflops_per_second"] == pytest.approx((90 + 500) / 1000 / 3)
    assert figures["flops_utilization"] == pytest.approx((90 + 500) / 1000 / 3 / 50)
    speed.add(1, 10, 100)
    speed.pause()  # at 5 s
    assert speed.overall()["model_tflops_per_second"] == pytest.approx((120 + 600) / 1000 / 5)
    resumed = Speed(0.0, RowFlops(3e9, 1e9), None)
    resumed.load_state_dict(speed.state_dict())
    figures = resumed.overall()
    assert figures["model_tflops_per_second"] == pytest.approx((120 + 600) / 1000 / 5)
    assert "flops_utilization" not in figures


def test_an_update_that_is_done_again_counts_once(bert):
    model = load(bert)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    meter = Meter(Accelerator(), model, optimizer, str, 0.0)
    for loss in (5.0, 7.0):  # the first attempt ran out of memory
        meter.start_update()
        meter.add_loss(torch.tensor(loss))
    meter.guard_update(1, 2.0, torch.tensor(1.0))
    assert meter.loss() == 3.5


def test_the_peak_of_memory_outlives_what_used_it(bert):
    name, before = devices.peak_memory(torch.device("cpu"))
    assert name == "peak_resident_memory_gib"
    some = torch.ones(2**28, dtype=torch.uint8)  # a quarter of a GiB
    del some
    _, after = devices.peak_memory(torch.device("cpu"))
    status = Path("/proc/self/status").read_text()
    resident = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20
    assert before <= after == pytest.approx(resident, rel=0.01)
    model = load(bert)
    meter = Meter(Accelerator(), model, torch.optim.AdamW(model.parameters()), str, 0.0)
    meter.load_state_dict({**meter.state_dict(), "peak_memory": {name: 1000.0}})
    meter.add_loss(torch.tensor(1.0))
    meter.guard_update(1, 1.0, torch.tensor(1.0))
    meter.count_update(1, 3, 4, 9)
    assert meter.read()[name] == 1000.0  # of an earlier start
    assert meter.overall()[f"train_{name}"] == 1000.0


def test_the_published_rate_of_a_gpu(monkeypatch):
    accelerator = Accelerator()
    rates = {}
    for name in ("NVIDIA A100-SXM4-80GB", "Tesla T4", "NVIDIA L40S", "NVIDIA H200 MIG 1g.18gb"):
        for kind in ("no", "bf16"):
            monkeypatch.setattr(devices, "device_name", lambda _, name=name: name)
            monkeypatch.setattr(devices, "precision", lambda _, kind=kind: kind)
            assert devices.peak_tflops(accelerator) is None  # a CPU
            with monkeypatch.context() as patch:
                patch.setattr(accelerator.state, "device", torch.device("cuda"))
                rates[name, kind] = devices.peak_tflops(accelerator)
    known = {key: rate for key, rate in rates.items() if rate is not None}
    assert known == {
        ("NVIDIA A100-SXM4-80GB", "no"): 19.5,
        ("NVIDIA A100-SXM4-80GB", "bf16"): 312.0,
        ("Tesla T4", "no"): 8.1,
    }
