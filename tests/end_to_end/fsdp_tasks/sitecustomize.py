"""Puts the script under FSDP2 on CPUs, where the batch script starts it: Python imports this first.

Each process says how many of its parameters are sharded.
"""

import os
import runpy
import sys
from pathlib import Path

SHIM = Path(__file__).parents[2] / "backends" / "fsdp_on_cpu.py"

if sys.orig_argv[1:2] == ["train_mrpc.py"]:
    os.execv(sys.executable, [sys.executable, __file__, *sys.orig_argv[1:]])

if __name__ == "__main__":
    from accelerate import Accelerator
    from torch.distributed.tensor import DTensor

    prepare = Accelerator.prepare

    def prepare_and_tell(self, *objects):
        prepared = prepare(self, *objects)
        if len(objects) > 1:
            parameters = list(prepared[0].parameters())
            sharded = sum(isinstance(parameter, DTensor) for parameter in parameters)
            print(f"sharded: {sharded} of {len(parameters)} parameters", flush=True)
        return prepared

    Accelerator.prepare = prepare_and_tell
    sys.argv = [str(SHIM), *sys.argv[1:]]
    runpy.run_path(str(SHIM), run_name="__main__")
