"""Runs a script under FSDP2 on CPUs, where Accelerate would fall back to DDP."""

import runpy
import sys
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

start = Accelerator.__init__


def start_as_on_gpus(self, **options):
    AcceleratorState._reset_state()
    PartialState(cpu=True)._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    start(self, **options)


Accelerator.__init__ = start_as_on_gpus
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))  # as Python does for a script
runpy.run_path(sys.argv[0], run_name="__main__")
