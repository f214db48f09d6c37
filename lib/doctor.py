"""Check that a job would run on this machine, before it starts.

    python -m lib.doctor [flags of train_mrpc.py]

Trains nothing, needs no network, and takes some seconds. Prints a line for each thing that a run
depends on: ok, note (it runs, but not as you may think) or FAIL, with the remedy. The exit status
is 1 if the job would fail, and 2 after bad flags.
"""

import contextlib
import importlib.metadata
import io
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

from lib.backends import deepspeed, settings
from lib.cli.parsing import parse_arguments
from lib.cli.startup import exit_status
from lib.errors import InputError
from lib.hub.reach import go_offline_if_unreachable

OK, NOTE, FAIL = "ok", "note", "FAIL"

REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"

# Bytes: BERT base in fp32, for a model that is not here yet; what NCCL or a DataLoader may need of
# /dev/shm, which Docker makes 64 MB large.
BERT_BASE = 440_000_000
SHARED_MEMORY = 256_000_000


class Finding(NamedTuple):
    """A line of the report."""

    word: str
    subject: str
    text: str


def main(arguments: Sequence[str]) -> int:
    """Print the report, and return the exit status."""
    with exit_status():
        config = parse_arguments(arguments)
    environment = os.environ
    task, local_task = (
        int(environment.get(name, environment.get(slurm, "0")))
        for name, slurm in (("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID"))
    )
    if local_task > 0:
        return 0  # the first process of each machine checks it
    dataset = config.dataset_name if config.train_file is None else None
    tracked = config.with_tracking or {"wandb", "all"} & set(config.report_to)
    model = (config.model_name_or_path, config.model_revision)
    # Before PyTorch is imported, as a run does it.
    findings = [
        versions(REQUIREMENTS),
        accelerate_settings(config.gradient_accumulation_steps, config.mixed_precision),
        hub(*model, dataset),
        accelerators(),
        processes(environment),
        precision(config.mixed_precision or environment.get(settings.MIXED_PRECISION, "no")),
        threads(environment),
        launcher(environment),
        *caches(environment),
        wandb(config.wandb_mode) if tracked else Finding(OK, "wandb", "not asked for"),
        output(Path(config.output_dir), *model, config.checkpoints_to_keep or 1),
        shared_memory(config.dataloader_num_workers, environment),
    ]
    if task > 0:  # the main process prints for all that is well
        findings = [found for found in findings if found.word == FAIL]
    for word, subject, text in findings:
        print(f"{word:<5}{subject:<19}{f'{socket.gethostname()}: ' if task else ''}{text}")
    return int(any(found.word == FAIL for found in findings))


def versions(requirements: Path) -> Finding:
    """Compare the installed packages with the versions that were tested."""
    missing, old, others = [], [], []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        wanted = line.partition("#")[0].strip()
        requirement = Requirement(wanted) if wanted else None
        if requirement is None or (requirement.marker and not requirement.marker.evaluate()):
            continue
        tested = Version(next(iter(requirement.specifier)).version)
        try:
            found = Version(importlib.metadata.version(requirement.name))
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if found.major < tested.major:
            old.append(f"{requirement.name} {found} (tested: {tested})")
        elif found.release != tested.release:
            others.append(f"{requirement.name} {found} (tested: {tested})")
    remedy = f"pip install -r {requirements.name}"
    if missing or old:
        wrong = [f"{name} is not installed" for name in missing] + [
            f"{name} is old" for name in old
        ]
        return Finding(FAIL, "versions", f"{', '.join(wrong)}: {remedy}")
    if others:
        return Finding(NOTE, "versions", f"not those tested: {', '.join(others)}; {remedy}")
    return Finding(OK, "versions", f"as tested (Python {sys.version.split()[0]})")


def accelerate_settings(accumulation: int | None, precision: str | None) -> Finding:
    """Check what `accelerate launch` or the batch script has set."""
    subject = "accelerate"
    try:
        settings.check(os.environ, accumulation)
        settings.use_precision(os.environ, precision)
        deepspeed.check_settings()
    except InputError as error:
        return Finding(FAIL, subject, str(error))
    lines = settings.unused(os.environ)
    return Finding(NOTE if lines else OK, subject, "; ".join(lines) or "its settings are honored")


def accelerators() -> Finding:
    """Name the devices and their driver."""
    import torch

    subject = "accelerators"
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is not None:
        number = torch.accelerator.device_count()
        name = torch.cuda.get_device_name(0) if kind.type == "cuda" else kind.type
        release = f", CUDA {torch.version.cuda}" if kind.type == "cuda" else ""
        return Finding(OK, subject, f"{number} x {name}{release}{_driver()}")
    text = f"none: training on the CPU, {_num_cores()} cores"
    if Path("/dev/nvidiactl").exists():
        remedy = "install a PyTorch that supports its driver"
        text += f", though there is an NVIDIA device{_driver()}: {remedy}"
        return Finding(NOTE, subject, text)
    return Finding(OK, subject, text)


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", path.read_text()) if path.exists() else None
    return f", driver {found[1]}" if found else ""


def processes(environment: Mapping[str, str]) -> Finding:
    """Compare the processes that were asked for with those that would meet."""
    import torch

    subject = "processes"
    by_launcher = int(environment.get("WORLD_SIZE", "1"))
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    asked = max(by_launcher, int(tasks))
    if asked == 1:
        return Finding(OK, subject, "1")
    device = torch.accelerator.current_accelerator(check_available=True)
    lonely = f"{asked} asked for, but they do not see each other: "
    if device is None and not settings.is_true(environment.get("ACCELERATE_USE_CPU")):
        remedy = "there is no GPU here; on CPUs set ACCELERATE_USE_CPU=true"
        return Finding(FAIL, subject, lonely + remedy)
    if "MASTER_ADDR" not in environment:
        remedy = "set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as does "
        return Finding(FAIL, subject, f"{lonely}{remedy}slurm/multi_node.sbatch")
    here = int(environment.get("LOCAL_WORLD_SIZE", environment.get("SLURM_NTASKS_PER_NODE", "1")))
    if device is not None and "SLURM_STEP_ID" not in environment:
        number = torch.accelerator.device_count()
        if here > number:
            text = f"{here} on this machine for {number} GPUs, and NCCL refuses to share one: "
            return Finding(FAIL, subject, f"{text}start one for each GPU")
    return Finding(OK, subject, f"{asked}, which meet at {environment['MASTER_ADDR']}")


def precision(value: str) -> Finding:
    """Check that the hardware has the precision that was asked for."""
    import torch

    from lib.backends.devices import computes_in_bf16, fastest_precision

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if value == "fp16" and device.type == "cpu":
        other = "bf16 or no" if computes_in_bf16(device) else "no"
        return Finding(NOTE, "precision", f"CPUs have no fp16: fp32 instead; set {other}")
    if value == "auto":
        value = fastest_precision(device)
    if value == "bf16" and not computes_in_bf16(device):
        other = "no" if device.type == "cpu" else "fp16"
        text = f"this {device.type.upper()} has no bf16 and only emulates it, slowly: set {other}"
        return Finding(NOTE, "precision", text)
    return Finding(OK, "precision", "fp32" if value == "no" else value)


def threads(environment: Mapping[str, str]) -> Finding:
    """Compare the threads of the processes on this machine with its cores."""
    import torch

    here = int(environment.get("LOCAL_WORLD_SIZE", environment.get("SLURM_NTASKS_PER_NODE", "1")))
    number, cores = torch.get_num_threads(), _num_cores()
    text = f"{number} per process, on {cores} cores"
    on_cpu = torch.accelerator.current_accelerator(check_available=True) is None
    if on_cpu and number == 1 and here < cores:
        return Finding(NOTE, "threads", f"{text}: unset OMP_NUM_THREADS, or raise it")
    if number * here > max(cores, here):
        remedy = f"set OMP_NUM_THREADS={max(1, cores // here)}"
        return Finding(NOTE, "threads", f"{text}, for {here} processes: {remedy}")
    return Finding(OK, "threads", text)


def _num_cores() -> int:
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return found or 1


def launcher(environment: Mapping[str, str]) -> Finding:
    """Name what starts the processes, and whether its signals reach them."""
    subject = "launcher"
    if "TORCHELASTIC_RUN_ID" in environment:
        text = "torchrun or accelerate launch: it passes signals on, but exits with a status of 1"
        return Finding(OK, subject, text)
    if "ACCELERATE_DYNAMO_MODE" in environment and "RANK" not in environment:
        text = "accelerate launch of one process passes no signals on: use python train_mrpc.py"
        return Finding(NOTE, subject, text)
    if "SLURM_JOB_ID" in environment:
        names = ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS")
        job, nodes, tasks = (environment.get(name, "1") for name in names)
        text = f"Slurm job {job}, {nodes} nodes, {tasks} tasks: signals reach what srun starts"
        return Finding(OK, subject, text)
    path = _hf_home(environment) / "accelerate" / "default_config.yaml"
    if path.exists():
        text = f"python; accelerate launch without --config_file would read {path}"
        return Finding(NOTE, subject, text)
    return Finding(OK, subject, "python: signals arrive")


def hub(model: str, revision: str | None, dataset: str | None) -> Finding:
    """Check that the model and the data are here, cached, or in reach."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            go_offline_if_unreachable(model, revision, dataset)
    except InputError as error:
        return Finding(FAIL, "hub", str(error))
    local = Path(model).exists() and (dataset in (None, "demo") or Path(dataset or "").exists())
    return Finding(OK, "hub", said.getvalue().strip() or ("not needed" if local else "in reach"))


def caches(environment: Mapping[str, str]) -> Iterable[Finding]:
    """Check that the hub's cache and the one of tokenized rows can be written."""
    home = _hf_home(environment)
    folders = {
        "HF_HOME": home,
        "HF_DATASETS_CACHE": Path(environment.get("HF_DATASETS_CACHE", home / "datasets")),
    }
    for name, folder in folders.items():
        reason = _unwritable(folder)
        if reason:
            yield Finding(FAIL, name, f"{folder} {reason}: set {name} to another folder")
        else:
            yield Finding(OK, name, f"{folder}, {_free(folder) / 1e9:,.1f} GB free")


def _hf_home(environment: Mapping[str, str]) -> Path:
    cache = environment.get("XDG_CACHE_HOME", "~/.cache")
    return Path(environment.get("HF_HOME", f"{cache}/huggingface")).expanduser()


def wandb(mode: str | None) -> Finding:
    """Check that wandb could be reached; without it a run is tracked offline."""
    mode = mode or os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled"):
        return Finding(OK, "wandb", mode)
    from lib.tracking.wandb_run import no_server

    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    reason = no_server(server, os.environ.get("WANDB_API_KEY"), seconds=3.0)
    if reason is None:
        return Finding(OK, "wandb", "online")
    remedy = "--wandb_mode offline does so at once" if mode == "online" else "wandb sync uploads it"
    return Finding(NOTE, "wandb", f"{reason}: the run would be tracked offline; {remedy}")


def output(folder: Path, model: str, revision: str | None, num_checkpoints: int) -> Finding:
    """Check that the output folder can be written, and has room for the checkpoints."""
    from lib.checkpoints.atomic import check_space

    reason = _unwritable(folder)
    if reason:
        text = f"--output_dir {folder} {reason}: choose another folder"
        return Finding(FAIL, "output", text)
    # Weights and two moments, once more while the newest is written, and the exported weights.
    needed = _weights(model, revision) * (3 * (num_checkpoints + 1) + 1)
    try:
        check_space(folder, needed)
    except InputError as error:
        return Finding(FAIL, "output", str(error))
    text = f"{folder}: needs some {needed / 1e9:,.1f} GB of {_free(folder) / 1e9:,.1f} GB free"
    return Finding(OK, "output", text)


def _weights(model: str, revision: str | None) -> int:
    """Bytes of a model's weights."""
    from huggingface_hub import try_to_load_from_cache

    files = list(Path(model).glob("*.safetensors")) + list(Path(model).glob("*.bin"))
    if not Path(model).exists():
        cached = try_to_load_from_cache(model, "model.safetensors", revision=revision)
        files = [Path(cached)] if isinstance(cached, str) else []
    return sum(path.stat().st_size for path in files) or BERT_BASE


def shared_memory(num_workers: int, environment: Mapping[str, str]) -> Finding:
    """Check the size of /dev/shm, through which workers and NCCL pass their data."""
    folder = Path("/dev/shm")
    if not folder.exists():
        return Finding(OK, "/dev/shm", "not on this system")
    free = _free(folder)
    several = num_workers > 0 or int(environment.get("WORLD_SIZE", "1")) > 1
    if several and free < SHARED_MEMORY:
        remedy = "docker run --shm-size=1g, or --dataloader_num_workers 0"
        return Finding(NOTE, "/dev/shm", f"only {free / 1e6:,.0f} MB free: {remedy}")
    return Finding(OK, "/dev/shm", f"{free / 1e6:,.0f} MB free")


def _there(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _free(folder: Path) -> int:
    return shutil.disk_usage(_there(folder)).free


def _unwritable(folder: Path) -> str | None:
    """Return why nothing can be written into a folder, which need not exist yet."""
    try:
        with tempfile.TemporaryFile(dir=_there(folder)) as file:
            file.write(b"some bytes")
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
