"""Runs of the script under FSDP2, in the processes that torchrun started, on CPUs.

Accelerate enters FSDP only for accelerators, and would fall back to DDP here.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

os.environ |= {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from lib.cli.parsing import parse_arguments
from lib.report import results
from train_mrpc import main

Accelerator.end_training = lambda _: None
results.write_report = lambda *_: None  # takes longer than the training
PartialState(cpu=True)

for arguments in json.loads(Path(sys.argv[1]).read_text()):
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    main(parse_arguments(arguments))
