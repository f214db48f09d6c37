"""`accelerate launch` for the tasks of srun.

    srun python -m lib.backends.launcher --config_file accelerate_configs/fsdp2.yaml \\
      train_mrpc.py [flags of train_mrpc.py]

`accelerate launch` starts processes of its own, and neither signals nor exit statuses get past it.
Here srun starts them, and each becomes the script, in the environment that Accelerate gives its
processes. The file says what they are (DDP, FSDP, DeepSpeed) and Slurm how many.
"""

import argparse
import os
import sys

import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from lib.errors import InputError


def task_of_srun(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command of this task, and its environment.

    Args:
        arguments: as for `accelerate launch`.

    Raises:
        InputError: this is no task of srun, or the file starts no process for each task.
    """
    missing = [name for name in ("SLURM_PROCID", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise InputError(
            f"{missing[0]} is not set: start this as slurm/multi_node.sbatch does; without Slurm, "
            "use accelerate launch"
        )
    num_tasks = os.environ["SLURM_NTASKS"]
    # As on one machine: Accelerate then prepares no connection to others. The port is not used.
    here = [f"--num_processes={num_tasks}", "--num_machines=1", "--main_process_port=0"]
    args = launch_command_parser().parse_args([*here, *arguments])
    _check_file(args.config_file)
    try:
        environment = _environment(args)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--config_file {args.config_file}: {reason}") from error
    script = [*(["-m"] if args.module else []), args.training_script]
    return [sys.executable, *script, *args.training_script_args], {
        **environment,
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": num_tasks,
    }


def _environment(args: argparse.Namespace) -> dict[str, str]:
    """The environment that `accelerate launch` gives to torchrun, and that to its processes."""
    args, defaults, precision_of_file = _validate_launch_command(args)
    if args.use_deepspeed:
        fields = [*defaults.deepspeed_config, *["mixed_precision"] * precision_of_file]
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        environment: dict[str, str] = prepare_deepspeed_cmd_env(args)[1]
    elif args.use_fsdp or args.multi_gpu:
        environment = prepare_multi_gpu_env(args)
    else:
        kind = defaults.distributed_type.value
        raise ValueError(f"distributed_type is {kind}: srun starts MULTI_GPU, FSDP or DEEPSPEED")
    return environment


def _check_file(path: str | None) -> None:
    if path is None:
        raise InputError("--config_file is missing: name one of accelerate_configs/")
    try:
        with open(path, encoding="utf-8") as file:
            if not isinstance(yaml.safe_load(file), dict):
                raise ValueError("it must hold a 'name: value' line for each setting")
        load_config_from_file(path)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--config_file {path} cannot be used: {reason}") from error


def main(arguments: list[str]) -> None:
    """Become the script; exit with status 2 after one line if that is not possible."""
    try:
        command, environment = task_of_srun(arguments)
    except InputError as error:
        if os.environ.get("SLURM_PROCID", "0") == "0":
            print(f"lib.backends.launcher: error: {error}", file=sys.stderr)
        sys.exit(2)
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    main(sys.argv[1:])
