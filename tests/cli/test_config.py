import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from lib.cli.config import TrainConfig
from lib.cli.parsing import parse_arguments
from lib.cli.rules import num_warmup_updates, resolve_batch_sizes
from lib.cli.startup import hide_token
from lib.errors import InputError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # (train_batch_size, per_device, accumulation, processes) -> (global batch, accumulation)
        ((None, None, None, 1), (32, 1)),
        ((None, None, None, 4), (32, 1)),
        ((None, None, 4, 1), (32, 4)),
        ((32, 8, None, 1), (32, 4)),
        ((32, 8, None, 2), (32, 2)),
        ((32, 8, None, 3), (32, 2)),
        ((32, 8, None, 8), (32, 1)),
        ((32, 8, 2, 2), (32, 2)),
        # as the peers: rows per device x accumulation x processes
        ((None, 8, None, 1), (8, 1)),
        ((None, 8, 4, 2), (64, 4)),
    ],
)
def test_batch_sizes(given, expected):
    assert resolve_batch_sizes(*given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((32, 8, 4, 2), "--train_batch_size 32 .*8 .* 4 .* 2 processes = 64.*need 2"),
        ((3, None, None, 4), "3 is less than 4 processes x 1 .*= 4"),
    ],
)
def test_the_error_of_contradicting_batch_sizes_shows_the_arithmetic(given, message):
    with pytest.raises(InputError, match=message):
        resolve_batch_sizes(*given)


def test_warmup():
    assert num_warmup_updates(None, 0.1, 345) == 35
    assert num_warmup_updates(7, 0.1, 345) == 7
    with pytest.raises(InputError, match="400 is more than the 345 updates"):
        num_warmup_updates(400, 0.1, 345)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lerning_rate", "1"], "unknown flag --lerning_rate: did you mean --learning_rate?"),
        (["--warmup_ratio", "100"], "--warmup_ratio must lie in .0, 1., got 100: .*--num_warmup"),
        (["--seed", "abc"], "--seed.*'abc'"),
        (["--seed"], "--seed"),
        (["--learning_rate", "nan"], "--learning_rate takes a number, got 'nan'"),
        (["--num_train_epochs", "0"], "--num_train_epochs must be at least 1, got 0"),
        (["--task_name", "mprc"], "--task_name must be one of .*'mprc': did you mean mrpc"),
        (["--lr_scheduler_type", "lineal"], "did you mean linear"),
        (["--report_to", "wanbd"], "did you mean wandb"),
        (["--checkpointing_steps", "often"], "a number of updates or 'epoch', got 'often'"),
        (["--length_grouping", "maybe"], "takes true or false, got 'maybe'"),
        (["--train_file", "none.csv", "--validation_file", "none.csv"], "none.csv: no such file"),
        (["--train_file", "none.csv"], "--train_file without --validation_file.*_share 0.1"),
        (["--validation_share", "1"], "must lie in .0.001, 0.999., got 1: it is a share"),
        (["--validation_share", "0.1", "--folds", "5", "--fold", "0"], "both say which rows valid"),
        (["--folds", "5"], "--folds N and --fold I belong together"),
        (["--fold", "0"], "--folds N and --fold I belong together"),
        (["--folds", "5", "--fold", "5"], "--fold must lie in .0, 4., got 5"),
        (["--validation_file", "none.csv"], "without --train_file"),
        (["--text_columns", "a", "b", "c"], "one or two names, got 3"),
        (["--config", "none.yaml"], "none.yaml cannot be read"),
        (["--lr_scheduler_type", "constant", "--num_warmup_steps", "3"], "constant_with_warmup"),
        (["--num_warmup_steps", "9", "--max_train_steps", "5"], "never reach its peak"),
    ],
)
def test_explains_a_bad_flag_in_one_line(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        parse_arguments(arguments)
    assert "\n" not in str(error.value)


def test_rejects_an_empty_file_and_one_of_an_unknown_format(tmp_path):
    for name, message in (
        ("a.csv", "a.csv is empty"),
        ("a.txt", "a.txt: its extension does not name a format"),
    ):
        path = tmp_path / name
        path.write_text("" if name == "a.csv" else "x")
        with pytest.raises(InputError, match=message):
            parse_arguments([f"--train_file={path}", f"--validation_file={path}"])


def test_flags_are_read_in_every_usual_spelling():
    config = parse_arguments(
        ["--max-length=64", "--seed", "7", "--with_tracking", "--length_grouping", "false"]
        + ["--report_to", "wandb", "tensorboard", "--pad_to_max_length=true"]
    )
    assert (config.max_length, config.seed, config.with_tracking) == (64, 7, True)
    assert (config.length_grouping, config.pad_to_max_length) == (False, True)
    assert config.report_to == ("wandb", "tensorboard")


# Every flag of transformers' run_glue_no_trainer.py, each with a value of its type.
RUN_GLUE_FLAGS = """
    --task_name mrpc --max_length 128 --pad_to_max_length --model_name_or_path bert
    --use_slow_tokenizer --per_device_train_batch_size 8 --per_device_eval_batch_size 8
    --learning_rate 5e-5 --weight_decay 0.0 --num_train_epochs 3 --max_train_steps 10
    --gradient_accumulation_steps 1 --lr_scheduler_type linear --num_warmup_steps 0
    --output_dir out --seed 42 --push_to_hub --hub_model_id me/it --hub_token secret
    --trust_remote_code --checkpointing_steps epoch --resume_from_checkpoint out/epoch_0
    --with_tracking --report_to all --ignore_mismatched_sizes
"""


def test_accepts_every_flag_of_run_glue_no_trainer(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "epoch_0").mkdir(parents=True)
    (tmp_path / "out" / "epoch_0" / "manifest.json").touch()
    paths = ["--train_file", str(files["train"]), "--validation_file", str(files["validation"])]
    config = parse_arguments(RUN_GLUE_FLAGS.split() + paths)
    assert config.num_warmup_steps == 0
    assert config.checkpointing_steps == "epoch"
    assert config.resume_from_checkpoint == "out/epoch_0"


def test_configuration_reads_back(tmp_path):
    config = parse_arguments(["--learning_rate=3e-5", "--report_to", "wandb", "--hub_token=x"])
    written = yaml.safe_dump(config.to_dict())
    assert "hub_token" not in written
    (tmp_path / "config.yaml").write_text(written)
    again = parse_arguments(["--config", str(tmp_path / "config.yaml"), "--seed", "3"])
    assert (again.learning_rate, again.report_to, again.seed) == (3e-5, ("wandb",), 3)


def test_flags_complete_a_configuration_file(tmp_path, files):
    path = tmp_path / "part.yaml"
    path.write_text(f"train_file: {files['train']}\ncheckpointing_steps: 10\nreport_to: wandb\n")
    arguments = ["--config", str(path), "--validation_file", str(files["validation"])]
    config = parse_arguments(arguments)
    assert (config.checkpointing_steps, config.report_to) == ("10", ("wandb",))
    with pytest.raises(InputError, match="--train_file without --validation_file"):
        parse_arguments(arguments[:2])


def test_hides_a_token_on_the_command_line():
    arguments = ["--seed", "1", "--hub_token", "secret", "--hub-token=secret"]
    hide_token(arguments)
    assert arguments == ["--seed", "1", "--hub_token", "***", "--hub_token=***"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown flag learning_rat: did you mean learning_rate"),
        ("learning_rate: fast", "bad.yaml: learning_rate takes a number, got 'fast'"),
        ("seed: true", "bad.yaml: seed takes a whole number, got True"),
        ("[1, 2]", "must hold one 'flag: value' line for each flag"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_bad_configuration_files(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        parse_arguments(["--config", str(tmp_path / "bad.yaml")])


def test_yaml_numbers_without_a_point(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 5e-5\n")
    assert parse_arguments(["--config", str(tmp_path / "a.yaml")]).learning_rate == 5e-5


def test_every_field_explains_itself_in_help():
    done = subprocess.run(
        [sys.executable, ROOT / "train_mrpc.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for name in TrainConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in done.stdout or f"--{name}" in done.stdout


def test_help_imports_nothing_heavy():
    """So `--help` takes less than a second."""
    code = (
        "import sys, runpy; sys.argv = ['train_mrpc.py', '--help']\n"
        "try: runpy.run_path('train_mrpc.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
