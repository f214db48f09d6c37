"""The script under DeepSpeed on CPUs, in the processes that `accelerate launch` started.

    deepspeed_on_cpu.py FLAGS        as train_mrpc.py
    deepspeed_on_cpu.py RUNS.json    several runs, one after the other

Accelerate enters DeepSpeed only if it is not told to use the CPUs, which it must be for gloo.
NAN_AT="1 3": the loss of the fourth micro-batch on rank 1 is a NaN.
"""

import json
import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import deepspeed
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from lib.cli.parsing import parse_arguments
from lib.cli.startup import exit_status
from lib.report import results
from lib.training import optimization
from train_mrpc import main

initialize = AcceleratorState.__init__
loss_sum = optimization.loss_sum


def enter_deepspeed(state, *arguments, **options):
    if not PartialState._shared_state:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
        del os.environ["ACCELERATE_USE_CPU"]
    initialize(state, *arguments, **options)


def poisoned(*arguments):
    global micro_batches_left
    micro_batches_left -= 1
    return loss_sum(*arguments) * (float("nan") if micro_batches_left == -1 else 1.0)


AcceleratorState.__init__ = enter_deepspeed
# Compiling DeepSpeed's own collectives for CPUs takes a minute; without them it takes gloo's.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
results.write_report = lambda *_: None  # takes longer than the training
rank, micro_batches_left = map(int, os.environ.get("NAN_AT", "-1 0").split())
if os.environ["RANK"] == str(rank):
    optimization.loss_sum = poisoned

if not sys.argv[1].endswith(".json"):
    runpy.run_path(str(Path(__file__).parents[2] / "train_mrpc.py"), run_name="__main__")
    sys.exit()

Accelerator.end_training = lambda _: None  # it takes the process group down
with exit_status():
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        AcceleratorState._reset_state()
        main(parse_arguments(arguments))
