"""The script under DeepSpeed on CPUs, in the processes that `accelerate launch` started.

Accelerate enters DeepSpeed only where it is not told to use the CPUs, and finds no process group
for them unless it is. NAN_AT="1 3" makes the loss of micro-batch 3 (from 0) on rank 1 a NaN.
"""

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import deepspeed
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from lib.training import optimization

initialize = AcceleratorState.__init__


def enter_deepspeed(state, *arguments, **options):
    if not PartialState._shared_state:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
        del os.environ["ACCELERATE_USE_CPU"]
    initialize(state, *arguments, **options)


AcceleratorState.__init__ = enter_deepspeed
# Compiling DeepSpeed's own collectives for CPUs takes a minute; without them it takes gloo's.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

if os.environ.get("NAN_AT", "").startswith(os.environ["RANK"]):
    loss_sum, left = optimization.loss_sum, int(os.environ["NAN_AT"].split()[1])

    def poisoned(*arguments):
        global left
        left -= 1
        return loss_sum(*arguments) * (float("nan") if left == -1 else 1)

    optimization.loss_sum = poisoned

runpy.run_path(str(Path(__file__).parents[2] / "train_mrpc.py"), run_name="__main__")
