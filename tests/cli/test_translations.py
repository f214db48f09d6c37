"""Command lines of run_glue.py and Trainer mean here what they mean there, or get an exact line."""

import dataclasses
import json
import re
import shlex

import pytest
import transformers
import yaml
from conftest import ROOT

from lib.cli.config import FLAGS
from lib.cli.parsing import parse_arguments
from lib.cli.translations import ALIASES, EQUALS, NAMES, OFF, REMARKS
from lib.errors import InputError

PAGE = (ROOT / "docs" / "from-run-glue.md").read_text()

# The dataclasses of run_glue.py (ModelArguments, DataTrainingArguments), of any version.
RUN_GLUE = """
    task_name dataset_name dataset_config_name max_seq_length overwrite_cache pad_to_max_length
    max_train_samples max_eval_samples max_predict_samples train_file validation_file test_file
    model_name_or_path config_name tokenizer_name cache_dir use_fast_tokenizer model_revision
    token use_auth_token trust_remote_code ignore_mismatched_sizes
"""

# Flags of TrainingArguments before transformers 5.
OLD = """
    adafactor dispatch_batches evaluate_during_training evaluation_strategy fp16_backend
    fp16_opt_level fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap group_by_length
    half_precision_backend include_inputs_for_metrics include_tokens_per_second jit_mode_eval
    logging_dir mp_parameters no_cuda overwrite_output_dir past_index per_gpu_eval_batch_size
    per_gpu_train_batch_size push_to_hub_model_id push_to_hub_organization push_to_hub_token
    ray_scope save_safetensors sharded_ddp split_batches torchdynamo tpu_metrics_debug
    tpu_num_cores use_ipex use_mps_device warmup_ratio xpu_backend
"""

FIELDS = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}


def test_every_flag_of_run_glue_and_trainer_is_known_and_on_the_page():
    """A new version of transformers may bring more: translate them."""
    names = FIELDS | {*RUN_GLUE.split(), *OLD.split()}
    assert sorted(names - FLAGS.keys() - NAMES) == []
    assert [name for name in sorted(names | NAMES) if f"`--{name}`" not in PAGE] == []


def test_the_table_names_what_exists():
    assert not NAMES & FLAGS.keys()
    assert set(ALIASES.values()) <= FLAGS.keys()
    assert EQUALS.keys() <= REMARKS.keys()
    assert REMARKS.keys() >= OFF
    said = " ".join(REMARKS.values())
    for path in set(re.findall(r"accelerate_configs/\S+\.yaml", said)):
        assert (ROOT / path).exists(), path
    launcher = {"config_file", "dynamo_backend", "dynamo_mode", "sdk", "private"}
    for name in set(re.findall(r"--(\w+)", said)) - launcher - NAMES:
        assert name in FLAGS, name


COMMAND = """
    --model_name_or_path google-bert/bert-base-cased --task_name MRPC --do_train --do_eval
    --max_seq_length 64 --per_device_train_batch_size 16 --per_device_eval_batch_size 8
    --learning_rate 2e-5 --num_train_epochs 3.0 --max_steps 300 --warmup_steps 30
    --weight_decay 0.1 --gradient_accumulation_steps 2 --label_smoothing_factor 0.05
    --optim adamw_torch --eval_strategy steps --eval_steps 50 --save_strategy steps
    --save_steps 100 --save_total_limit 3 --logging_strategy steps --logging_steps 5
    --load_best_model_at_end --metric_for_best_model eval_f1
    --train_sampling_strategy group_by_length --activation_checkpointing --report_to wandb
    --project team --run_name mine --no_use_fast_tokenizer --dataloader_num_workers 2 --seed 7
    --output_dir out
"""


def test_a_command_line_of_run_glue_means_what_it_means_there(capsys):
    """Read by the parser of transformers too."""
    words = shlex.split(COMMAND)
    config = parse_arguments(words)
    parser = transformers.HfArgumentParser(transformers.TrainingArguments)
    theirs, rest = parser.parse_known_args(words)
    assert "--max_seq_length" in rest  # of run_glue.py's own dataclasses
    assert (config.task_name, config.max_length, config.use_slow_tokenizer) == ("mrpc", 64, True)
    assert config.num_train_epochs == theirs.num_train_epochs
    assert config.max_train_steps == theirs.max_steps
    assert config.num_warmup_steps == theirs.warmup_steps
    assert config.label_smoothing == theirs.label_smoothing_factor
    assert config.eval_every == theirs.eval_steps
    assert int(config.checkpointing_steps) == theirs.save_steps
    assert config.checkpoints_to_keep == theirs.save_total_limit
    assert f"eval_{config.metric_for_best_model}" == theirs.metric_for_best_model
    assert config.length_grouping == (theirs.train_sampling_strategy == "group_by_length")
    assert config.gradient_checkpointing == theirs.activation_checkpointing
    assert config.wandb_project == theirs.project
    for name in FLAGS.keys() & FIELDS - {
        "gradient_checkpointing", "report_to", "num_train_epochs", "metric_for_best_model",
        "push_to_hub", "hub_model_id", "hub_token", "resume_from_checkpoint",
    }:  # fmt: skip
        assert getattr(config, name) == getattr(theirs, name, None), name
    said = capsys.readouterr().out.splitlines()
    assert "train_mrpc: --do_train is not needed: every run trains" in said
    needless = {line.split()[1] for line in said}
    assert needless == {
        "--do_train", "--do_eval", "--load_best_model_at_end", "--optim", "--logging_strategy",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ("--evaluation_strategy epoch", "eval_every", None),
        ("--save_strategy=epoch", "checkpointing_steps", "epoch"),
        ("--save-total-limit 2", "checkpoints_to_keep", 2),
        ("--group_by_length", "length_grouping", True),
        ("--group_by_length false", "length_grouping", False),
        ("--train_sampling_strategy random", "length_grouping", False),
        ("--max_steps -1", "max_train_steps", None),
        ("--warmup_steps 0.06", "warmup_ratio", 0.06),
        ("--warmup_steps 30.0", "num_warmup_steps", 30),
        ("--per_gpu_train_batch_size 4", "per_device_train_batch_size", 4),
        ("--lr 3e-5", "learning_rate", 3e-5),
        ("--dataset_config_name rte", "task_name", "rte"),
        ("--torch_compile false", "mixed_precision", None),
        ("--bf16", "mixed_precision", "bf16"),
        ("--bf16 false --fp16 true", "mixed_precision", "fp16"),
    ],
)
def test_other_names(arguments, name, value):
    assert getattr(parse_arguments(arguments.split()), name) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--fsdp full_shard auto_wrap", "--fsdp: Accelerate does this: accelerate launch --config"),
        (
            "--deepspeed ds.json",
            "--deepspeed: Accelerate .*accelerate_configs/deepspeed_zero2.yaml",
        ),
        ("--fp16_full_eval", "--fp16_full_eval: give --mixed_precision"),
        ("--torch_compile", "--torch_compile: .*accelerate launch --dynamo_backend inductor train"),
        ("--optim adafactor", "--optim adafactor: PyTorch's AdamW is the only optimizer"),
        ("--eval_strategy no", "--eval_strategy no: a run chooses its best model, so it evaluates"),
        ("--do_train false", "--do_train false: every run trains"),
        ("--no_remove_unused_columns", "--remove_unused_columns False: the model gets"),
        ("--load_best_model_at_end no", "--load_best_model_at_end no: --output_dir holds the best"),
        ("--save_strategy no", "--save_strategy no: steps with --save_steps N, or epoch"),
        ("--save_strategy steps", "--save_strategy steps needs --save_steps N"),
        ("--save_steps", "--save_steps needs a value"),
        ("--save_steps 0.1", "--checkpointing_steps must be a number of updates or 'epoch', got"),
        ("--save_strategy epoch --save_steps 5", "--save_strategy and --save_steps both decide"),
        ("--eval_steps 5 --eval_every 5", "--eval_steps and --eval_every both decide --eval_every"),
        ("--num_train_epochs 2.5", "--num_train_epochs takes a whole number, got '2.5'"),
        (
            "--per_device_train_batch_size all",
            "--per_device_train_batch_size takes a whole number or auto, got 'all'",
        ),
        ("--bf16 --fp16", "--bf16 and --fp16 both decide --mixed_precision"),
        ("--mixed_precision auto --bf16", "--mixed_precision and --bf16 both decide --mixed_prec"),
    ],
)
def test_what_has_no_equal_gets_its_own_line(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        parse_arguments(arguments.split())
    assert "did you mean" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["token", "use_auth_token", "push_to_hub_token"])
def test_a_token_is_not_shown(name):
    with pytest.raises(InputError, match=f"--{name}: set HF_TOKEN") as error:
        parse_arguments([f"--{name}", "hf_canary"])
    assert "canary" not in str(error.value)


def test_a_configuration_file_may_use_the_other_names(tmp_path):
    """Such as the JSON file that run_glue.py takes as its only argument."""
    path = tmp_path / "args.json"
    path.write_text(json.dumps({"save_steps": 500, "max_seq_length": 64, "do_train": True}))
    config = parse_arguments(["--config", str(path)])
    assert (config.checkpointing_steps, config.max_length) == ("500", 64)
    config = parse_arguments(["--config", str(path), "--save_strategy", "epoch"])
    assert config.checkpointing_steps == "epoch"
    path.write_text(yaml.safe_dump({"fsdp": "full_shard"}))
    with pytest.raises(InputError, match=r"args.json: fsdp: Accelerate does this"):
        parse_arguments(["--config", str(path)])


def test_the_page_shows_command_lines_that_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "args.json").write_text("{}")
    blocks = re.findall(r"```bash\n(.+?)```", PAGE, re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in commands if "train_mrpc.py" in line]
    assert len(words) >= 3
    for command in words:
        parse_arguments(command[command.index("train_mrpc.py") + 1 :])
