"""Each answer to `accelerate config` is honored, refused in one line, or said to have no effect."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.commands import launch
from accelerate.commands.config import cluster
from accelerate.commands.config.config_args import ClusterConfig, SageMakerConfig
from accelerate.utils import launch as environments
from conftest import ROOT, run_script

from lib.backends import deepspeed, settings
from lib.errors import InputError

# What each answer leads to; answers that are not listed are honored. Numbers count the options.
REFUSED = {
    "Which type of machine are you using?": {1: "starts only one for this distributed_type"},
    "Do you want to run your training on CPU only": {},
    "How many different machines will you use": {},
    "What is the rank of this machine?": {},
    "What is the IP address of the machine": {},
    "What is the port you will use": {},
    "Are all the machines on the same local network?": {},
    "What rendezvous backend will you use?": {},
    "Should distributed operations be checked while running": {},
    "should be used for distributed training?": {},
    "should be used for training on this machine as a comma-separated list?": {},
    "Would you like to enable numa efficiency?": {},
    "Do you want accelerate to launch mpirun?": {},  # mpirun itself tells the processes: see below
    "Please enter the path to the hostfile": {},
    # torch.compile
    "Do you wish to optimize your script with torch dynamo?": {},
    "Which dynamo backend would you like to use?": {
        **dict.fromkeys(range(3, 13), "use inductor"),
        11: "is not a valid DynamoBackend",  # misspelled in Accelerate's list
    },
    "Do you want to customize the defaults sent to torch.compile?": {},
    "Which mode do you want to use?": {},
    "Do you want the fullgraph mode": {},
    "Do you want to enable dynamic shape tracing?": {},
    "Do you want to enable regional compilation?": {},
    # Precision
    "Do you wish to use mixed precision?": {3: "mixed_precision: fp8"},
    "Which FP8 backend do you want to use?": {},
    "Which optimization level should be used?": {},
    "Do you want to use FP8 autocast during eval mode?": {},
    "What margin should be used": {},
    "What interval should be used": {},
    "Which weight format should be used?": {},
    "What length of history should be used": {},
    "Which algorithm should be used for the amax": {},
    "Do you want to execute `fprop`": {},
    "Should `fprop` be executed": {},
    "Should `dgrad` be executed": {},
    "Should `wgrad` be executed": {},
    "Do you want to enable FSDP2 float8 all gather?": {},
    "Do you want to pad the inner dimension": {},
    # DeepSpeed
    "Do you want to use DeepSpeed?": {},
    "Do you want to specify a json file to a DeepSpeed config?": {
        True: "not a readable JSON object"
    },
    "Please enter the path to the json DeepSpeed config file": {},
    "What should be your DeepSpeed's ZeRO optimization stage?": {
        stage: f"zero_stage is {stage}" for stage in (0, 1, 3)
    },
    "Where to offload optimizer states?": {
        1: "offload_optimizer_device (cpu)",
        2: "offload_optimizer_device (nvme)",
    },
    "Where to offload parameters?": {
        1: "offload_param_device (cpu)",
        2: "offload_param_device (nvme)",
    },
    "Nvme Path to offload parameters?": {},
    "Nvme Path to offload optimizer states?": {},
    "How many gradient accumulation steps you're passing": {},  # the flag decides, and says so
    "Do you want to use gradient clipping?": {},
    "What is the gradient clipping value? [1.0]": {},  # as well
    "Do you want to save 16-bit model weights": {},
    "Do you want to enable `deepspeed.zero.Init`": {},
    "Do you want to enable Mixture-of-Experts training": {True: "moe_layer_cls_names"},
    "Specify the comma-separated list of transformers MoE": {},
    "Which Type of launcher do you want to use?": {},
    "DeepSpeed configures multi-node compute resources": {},
    "Do you want to specify exclusion filter string?": {},
    "DeepSpeed exclusion filter string": {},
    "Do you want to specify inclusion filter string?": {},
    "DeepSpeed inclusion filter string": {},
    # FSDP
    "Do you want to use FullyShardedDataParallel?": {},
    "What should be your FSDP version?": {0: "set fsdp_version: 2"},
    "What should be your sharding strategy?": {},
    "Do you want to enable resharding after forward?": {},
    "Do you want to offload parameters and gradients to CPU?": {True: "fsdp_offload_params"},
    "What should be your auto wrap policy?": {1: "set it to TRANSFORMER_BASED_WRAP"},
    "Do you want to use the model's `_no_split_modules`": {},
    "Specify the comma-separated list of transformer layer class names": {},
    "What should be your FSDP's minimum number of parameters": {},
    "What should be your FSDP's backward prefetch policy?": {},
    "What should be your FSDP's state dict type?": {},
    "Do you want to enable FSDP's forward prefetch policy?": {},
    "Do you want to enable FSDP's `use_orig_params` feature?": {},
    "Do you want to enable CPU RAM efficient model loading?": {True: "wrong weights"},
    "Do you want each individually wrapped FSDP unit": {},
    "Do you want to enable FSDP activation checkpointing?": {True: "--gradient_checkpointing"},
    # Other ways to split a model
    "Do you want to use the parallelism config?": {True: "parallelism_config: true"},
    "What is the data parallelism replicate size?": {},
    "What is the FSDP shard size?": {},
    "What is the tensor parallelism size?": {},
    "What is the context parallelism size?": {},
    "What is the compute parallelism communication strategy?": {},
    "Do you want to use Megatron-LM ?": {True: "is Megatron-LM"},
    "What is the Tensor Parallelism degree/size?": {},
    "Do you want to enable Sequence Parallelism?": {},
    "What is the Pipeline Parallelism degree/size?": {},
    "What is the number of micro-batches?": {},
    "Do you want to enable selective activation recomputation?": {},
    "Do you want to use distributed optimizer": {},
    "What is the gradient clipping value based on global L2 Norm": {},
    # TPU
    "What is the name of the function in your script": {},
    "Are you using a TPU cluster?": {True: "tpu_use_cluster"},
    "What is the name of your TPU cluster?": {},
    "What is the zone of your TPU cluster?": {},
    "To run a python script in a TPU pod, should `sudo` be used?": {},
    "Do you have code you wish to run on startup in each pod?": {},
    "Is this code located in a bash script?": {},
    "What is the path to your bash script?": {},
    "Please enter a single command": {},
    "Do you wish to add another command?": {},
    "If not using an instance group, what are the names": {},
    "What environment variables do you wish to set in each pod": {},
}

# What begins like this is refused whatever it says.
REFUSED_WHOLE = ("fp8_", "megatron_lm_", "parallelism_config_")

# The launcher's options that no question asks for. They reach no variable, or have a test below.
UNASKED = {
    *("help", "config_file", "training_script", "training_script_args", "module", "no_python"),
    *("cpu", "multi_gpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm"),
    *("use_parallelism_config", "num_cpu_threads_per_process", "quiet", "tee", "log_dir", "role"),
    *("rdzv_conf", "max_restarts", "monitor_interval", "vm", "env"),
    *("aws_access_key_id", "aws_secret_access_key"),
    *("fsdp_activation_checkpointing_offload", "fsdp_sharding_strategy"),
}

# Answers other than the first option and the default, from which the walk sets out.
FIRST = {
    "Which type of machine are you using?": 4,  # multi-GPU
    "How many different machines will you use": 2,
    "should be used for distributed training?": 4,
    "Do you want to enable CPU RAM efficient model loading?": False,
    "What should be your DeepSpeed's ZeRO optimization stage?": 2,
    "Please enter the path to the json DeepSpeed config file": "deepspeed.json",
    "What should be your FSDP version?": 1,
}


def entry(question):
    """The row of REFUSED for a question of this version of Accelerate."""
    found = [row for row in REFUSED if row in question]
    assert found, f"accelerate config asks something new: {question}"
    return found[0]


class Questionnaire:
    """Answers `accelerate config`, and notes every question and its other answers."""

    def __init__(self, answers):
        self.answers = answers
        self.given = {}
        self.others = []

    def options(self, question, options=(), convert_value=None, default=0):
        answer = self._answer(question, default, range(len(options)))
        return convert_value(answer) if convert_value else answer

    def field(self, question, convert_value=None, default=None, error_message=None):
        if convert_value in (int, float):
            answer = self._answer(question, default or 1, [1, 2])
        elif default in (True, False):
            answer = self._answer(question, default, [True, False])
        else:
            answer = self._answer(question, default or "word", [])
        return convert_value(answer) if convert_value in (int, float) else answer

    def _answer(self, question, default, alternatives):
        row = entry(question)
        if row in self.given:  # asked until the answer is no
            return default
        answer = self.answers.get(row, FIRST.get(row, default))
        self.given[row] = answer
        self.others += [(row, other) for other in alternatives if other != answer]
        return answer


def walk(monkeypatch):
    """Yield each configuration that one new answer leads to, and the answers that made it."""
    for library in ("deepspeed", "fp8", "transformer_engine", "msamp", "torchao"):
        monkeypatch.setattr(cluster, f"is_{library}_available", lambda: True)
    todo, seen = [{}], set()
    while todo:
        questionnaire = Questionnaire(todo.pop(0))
        monkeypatch.setattr(cluster, "_ask_options", questionnaire.options)
        monkeypatch.setattr(cluster, "_ask_field", questionnaire.field)
        try:
            yield questionnaire.given, cluster.get_cluster_input()
        except ValueError as error:
            yield questionnaire.given, error
        for row, other in questionnaire.others:
            if (row, other) not in seen:
                seen.add((row, other))
                todo.append({**questionnaire.answers, row: other})


@pytest.fixture
def environment_of(monkeypatch, tmp_path):
    """What `accelerate launch` makes of a configuration: the environment of the script."""
    made = {}
    for name, prepare in {
        "simple_launcher": lambda args: environments.prepare_simple_launcher_cmd_env(args)[1],
        "multi_gpu_launcher": environments.prepare_multi_gpu_env,
        "deepspeed_launcher": lambda args: environments.prepare_deepspeed_cmd_env(args)[1],
        "tpu_launcher": lambda args: environments.prepare_tpu(args, {})[1],
        # As `tpu_pod_launcher` tells the hosts of the pod.
        "tpu_pod_launcher": lambda args: {"ACCELERATE_IN_TPU_POD": "1"},
    }.items():
        monkeypatch.setattr(launch, name, lambda args, prepare=prepare: made.update(prepare(args)))
    monkeypatch.setattr(environments, "is_fp8_available", lambda: True)
    monkeypatch.setattr(environments, "is_torch_xla_available", lambda **_: True)
    monkeypatch.setattr(environments, "is_port_in_use", lambda *_: False)
    monkeypatch.setattr(environments, "compare_versions", lambda *_: False)  # DeepSpeed's is new
    monkeypatch.setattr(
        environments, "_get_mpirun_args", lambda: ("mpirun", "-f", "-n", "-ppn", "")
    )

    def launched(config, *options):
        path = tmp_path / "config.yaml"
        config.to_yaml_file(str(path))
        parsed = launch.launch_command_parser().parse_args(
            ["--config_file", str(path), *options, "train_mrpc.py"]
        )
        made.clear()
        launch.launch_command(parsed)
        return {name: made[name] for name in made if os.environ.get(name) != made[name]}

    return launched


def refusal(environment, accumulation=None):
    try:
        settings.check(environment, accumulation)
        with mock.patch.dict(os.environ, environment):
            deepspeed.check_settings()
    except InputError as error:
        return str(error)
    return None


def test_every_answer_to_accelerate_config_is_honored_or_refused(monkeypatch, environment_of):
    wrong, keys, rows = [], set(), set()
    for given, config in walk(monkeypatch):
        rows |= given.keys()
        expected = [REFUSED[row][answer] for row, answer in given.items() if answer in REFUSED[row]]
        if isinstance(config, ClusterConfig):
            keys |= set(vars(config)).union(*filter(is_dict, vars(config).values()))
            said = refusal(environment_of(config)) or ""
        else:
            said = str(config)  # `accelerate config` itself rejects the answer
        if bool(expected) != bool(said) or not any(words in said for words in expected or [""]):
            wrong.append((given, expected, said))
    assert not wrong
    assert rows == REFUSED.keys(), "accelerate config no longer asks this"
    options = {action.dest for action in launch.launch_command_parser()._actions} - keys
    options = {name for name in options if not name.startswith(REFUSED_WHOLE)}
    assert options == UNASKED, "accelerate launch has other options than those that were tried"


def is_dict(value):
    return isinstance(value, dict)


FSDP = {"fsdp_version": 2, "fsdp_cpu_ram_efficient_loading": False}


def fsdp(**options):
    return ClusterConfig(
        "LOCAL_MACHINE", "FSDP", "no", False, False, num_processes=2, fsdp_config=FSDP | options
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fsdp_ignored_modules": "classifier"}, "leaves the gradients of those modules unreduced"),
        ({"fsdp_reshard_after_forward": "FULL_SHARD"}, "set it to true or false"),
        ({"fsdp_state_dict_type": "LOCAL_STATE_DICT"}, "is for FSDP1"),
        ({"fsdp_activation_checkpointing_offload": True}, "which this script refuses"),
        # Without a value Accelerate's own default counts.
        ({"fsdp_cpu_ram_efficient_loading": "true"}, "Accelerate's default is true"),
        ({"fsdp_version": 1}, "set fsdp_version: 2"),
    ],
)
def test_refuses_what_only_hand_written_files_name(environment_of, options, words):
    assert refusal(environment_of(fsdp())) is None
    assert words in refusal(environment_of(fsdp(**options)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fsdp_state_dict_type": "SHARDED_STATE_DICT"}, "checkpoints hold whole tensors"),
        ({"fsdp_sharding_strategy": "SHARD_GRAD_OP"}, "see fsdp_reshard_after_forward"),
        ({"fsdp_backward_prefetch": "BACKWARD_PRE"}, "is not used by FSDP2"),
        ({"fsdp_forward_prefetch": True}, "is not used by FSDP2"),
    ],
)
def test_says_once_what_has_no_effect(environment_of, options, words):
    assert settings.unused(environment_of(fsdp())) == []
    environment = environment_of(fsdp(**options))
    assert refusal(environment) is None
    (line,) = settings.unused(environment)
    assert words in line


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_zero2", "multi_gpu", "cpu", "multi_cpu"])
def test_the_shipped_files_are_honored_without_a_remark(environment_of, name):
    config = ClusterConfig.from_yaml_file(str(ROOT / "accelerate_configs" / f"{name}.yaml"))
    environment = environment_of(config)
    assert refusal(environment) is None
    assert settings.unused(environment) == []


def test_accumulation_in_the_environment_may_not_differ_from_the_flag():
    """Accelerate reads the variable with every backend."""
    four = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    assert refusal(four, accumulation=4) is None
    assert "STEPS is 4, and --gradient_accumulation_steps 2" in refusal(four, accumulation=2)
    assert refusal(four) is not None
    one = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}
    assert refusal(one, accumulation=2) is None


def test_a_precision_in_capitals_would_be_fp32():
    assert "mixed_precision: BF16" in refusal({"ACCELERATE_MIXED_PRECISION": "BF16"})


@pytest.mark.parametrize("variable", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_of_mpirun_do_not_meet(variable):
    assert "mpirun started 2 processes" in refusal({variable: "2"})
    assert refusal({variable: "2", "WORLD_SIZE": "2"}) is None  # also given their ranks
    assert refusal({variable: "1"}) is None


def test_sagemaker_is_refused(monkeypatch):
    for name in ("AWS_PROFILE", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "")
    config = SageMakerConfig(
        "AMAZON_SAGEMAKER", "NO", "no", False, False, "ml.p3.2xlarge", "role", profile="me"
    )
    words = ["--mixed_precision=no", "--dynamo_backend=no", "train_mrpc.py"]
    parsed = launch.launch_command_parser().parse_args(words)
    estimator, _ = environments.prepare_sagemager_args_inputs(config, parsed)
    assert "Amazon SageMaker" in refusal(estimator["environment"])


@pytest.mark.parametrize(
    ("environment", "local_rank"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0", "LOCAL_RANK": "3"}, "0"),  # in the task's own cgroup
        ({"CUDA_VISIBLE_DEVICES": "3", "LOCAL_RANK": "3"}, "0"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "LOCAL_RANK": "3"}, "3"),
        ({"ROCR_VISIBLE_DEVICES": "1", "LOCAL_RANK": "1"}, "0"),
        ({"CUDA_VISIBLE_DEVICES": "", "LOCAL_RANK": "1"}, "1"),
        ({"LOCAL_RANK": "1"}, "1"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, None),
    ],
)
def test_a_task_with_one_gpu_of_its_own_calls_it_0(environment, local_rank):
    """Slurm's --gpus-per-task=1: DDP takes LOCAL_RANK for the number of a device."""
    settings.use_own_device(environment)
    assert environment.get("LOCAL_RANK") == local_rank


@pytest.mark.processes
def test_the_script_refuses_before_its_slow_imports():
    done = run_script(
        ["--demo"],
        environment={"ACCELERATE_MIXED_PRECISION": "fp8", "PYTHONPROFILEIMPORTTIME": "1"},
    )
    assert done.returncode == 2
    assert "train_mrpc.py: error: Accelerate's mixed_precision: fp8" in done.stderr
    assert "| torch\n" not in done.stderr


@pytest.mark.parametrize(
    ("own", "policy", "spins"),
    [
        ({}, "PASSIVE", "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "PASSIVE", "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", "30000000000"),
    ],
)
def test_threads_of_pytorch_soon_wait_without_a_core(own, policy, spins):
    """As libgomp says, which PyTorch's wheels bring, and which prints PASSIVE for no policy too."""
    libgomp = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    code = (
        "import ctypes, os; from lib.backends import settings; settings.tune_cpu(os.environ); "
        f"ctypes.CDLL({str(libgomp)!r})"
    )
    unset = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, **own, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(("own", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "1"}, False)])
def test_memory_is_kept_from_update_to_update(own, kept):
    """48 MB, as the gradient of BERT's embeddings; counted in small pages."""
    code = (
        "import ctypes, os, resource, torch; from lib.backends import settings\n"
        "settings.tune_cpu(os.environ)\n"
        "ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for update in range(30):\n"
        "    torch.ones(12 * 2**20)\n"
        "    before = faults() if update < 20 else before\n"
        "print(faults() - before)"
    )
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, **own},
        capture_output=True,
        text=True,
        check=True,
    )
    pages = 10 * 48 * 2**20 / resource.getpagesize()
    assert (int(done.stdout) < pages / 100) is kept
