"""Runs a script under FSDP2 on CPUs, where Accelerate would fall back to DDP.

    ACCELERATE_USE_CPU=true accelerate launch --config_file accelerate_configs/fsdp2.yaml \
      --num_processes 2 --mixed_precision no tests/backends/fsdp_on_cpu.py train_mrpc.py FLAGS

With NAN_AT=4, and any configuration file, rank 1 gets a NaN as the loss of its fourth micro-batch.
"""

import os
import runpy
import sys
from pathlib import Path

import safetensors.torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

start, backward = Accelerator.__init__, Accelerator.backward
num_backward = 0


def start_as_on_gpus(self, **options):
    AcceleratorState._reset_state()
    PartialState(cpu=True)._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    start(self, **options)


def backward_of_nan(self, loss):
    global num_backward
    num_backward += 1
    bad = num_backward == int(os.environ["NAN_AT"]) and self.process_index == 1
    backward(self, loss * float("nan") if bad else loss)


def load_file(*_):
    raise AssertionError("only rank 0 reads the files of a checkpoint")


if "ACCELERATE_USE_FSDP" in os.environ:  # the launcher sets it
    Accelerator.__init__ = start_as_on_gpus
    if os.environ["RANK"] != "0":
        safetensors.torch.load_file = load_file
if "NAN_AT" in os.environ:
    Accelerator.backward = backward_of_nan

sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))  # as Python does for a script
runpy.run_path(sys.argv[0], run_name="__main__")
