"""From Enter to the first update: flags, the demo's defaults, and signals that come early."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SCRIPT, start_script, wait_for

from lib.backends.xla import script_arguments
from lib.cli.config import FLAGS, TrainConfig
from lib.cli.parsing import parse_arguments
from lib.cli.resuming import FREE_FLAGS, LONGER_FLAGS
from lib.demo.corpus import DEFAULTS, MODEL_DIR
from lib.errors import InputError


def listens(pid):
    """True once the process handles SIGUSR1, of which it would die before."""
    with open(f"/proc/{pid}/status") as file:
        caught = next(line for line in file if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) & 1 << (signal.SIGUSR1 - 1))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("delay", [0, 0.05, 0.1, 0.2, 0.3])
def test_a_signal_in_the_first_moments_ends_with_one_line_and_75(tmp_path, name, delay):
    """While flags are parsed and libraries are imported; more signals change nothing."""
    log = tmp_path / "log"
    process = start_script(["--demo", f"--output_dir={tmp_path / 'out'}"], log=log)
    wait_for(lambda: listens(process.pid))
    time.sleep(delay)
    while process.poll() is None:  # also while the interpreter shuts down
        process.send_signal(signal.Signals[name])
        time.sleep(0.002)
    assert process.returncode == 75
    stopped = [line for line in log.read_text().splitlines() if "stopped by" in line]
    assert stopped == [f"train_mrpc.py: stopped by {name} before the first update"]
    assert "error" not in log.read_text()
    assert not (tmp_path / "out").exists()


def test_signals_during_the_shutdown_do_not_change_the_status(flags, tmp_path):
    """An error ends with 2, however often Slurm signals while the interpreter shuts down."""
    path = tmp_path / "bad.csv"
    path.write_text("sentence1,sentence2,label\na,b,0\nc,d,\n")
    arguments = [*flags, f"--train_file={path}", f"--output_dir={tmp_path / 'out'}"]
    log = tmp_path / "log"
    process = start_script(arguments, log=log)
    wait_for(lambda: "error:" in log.read_text())
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.002)
    assert process.returncode == 2


def test_the_demo_in_python_is_that_of_the_command_line():
    assert TrainConfig(demo=True) == parse_arguments(["--demo"])
    assert TrainConfig(demo=True).model_name_or_path == str(MODEL_DIR)
    # What is given wins, even where it equals the default of other runs.
    assert TrainConfig(demo=True, learning_rate=1e-4).learning_rate == 1e-4
    assert TrainConfig().learning_rate == 1e-4 != DEFAULTS["learning_rate"]


def test_an_unknown_field_is_an_error_in_python():
    with pytest.raises(TypeError, match="no field learning_rat"):
        TrainConfig(learning_rat=1)


def test_a_home_folder_is_the_users(monkeypatch, tmp_path):
    """Quoted, or behind an equals sign, the shell leaves the tilde to the script."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_arguments(["--output_dir=~/runs/x"]).output_dir == str(tmp_path / "runs" / "x")


def test_a_dangling_link_is_named(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"out is a link to .*gone, which does not exist: create"):
        parse_arguments([f"--output_dir={tmp_path / 'out'}"])


def help_of(*arguments):
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_help_is_grouped_and_begins_with_what_people_change_first():
    text = help_of("--help")
    usage = text.partition("\n\n")[0]
    assert usage.count("--") == 10
    assert "--model_name_or_path" in usage
    headings = [line[:-1] for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings[1:] == ["data", "model", "training", "evaluation", "output", "tracking", "hub"]
    assert "None" not in text
    assert "==SUPPRESS==" not in text


def test_h_behind_a_flag_without_a_value_is_no_value():
    assert help_of("--dry_run", "-h") == help_of("-h")


def test_a_flag_is_declared_once():
    """What may change on a resume, and what config.yaml keeps, follow from the declaration."""
    assert "output_dir" in FREE_FLAGS
    assert "learning_rate" not in FREE_FLAGS
    assert {"num_train_epochs", "max_train_steps"} == LONGER_FLAGS
    hidden = set(FLAGS) - set(TrainConfig().to_dict())
    assert hidden == {
        "config", "hub_token", "dry_run", "prefetch", "overwrite_output_dir",
        "resume_from_checkpoint", "profile",
    }  # fmt: skip
    assert "secret" not in repr(TrainConfig(hub_token="secret"))


@pytest.mark.parametrize(
    ("words", "position"),
    [
        (["accelerate", "launch", "--config_file", "tpu.yaml", str(SCRIPT), "--demo"], 4),
        ([str(SCRIPT), "--demo"], 0),
    ],
)
def test_finds_its_flags_where_the_launcher_of_tpus_imports_it(monkeypatch, words, position):
    """In the launcher, and in a process that it starts; other importers name no script."""
    assert script_arguments(str(SCRIPT)) == []
    monkeypatch.setattr(sys, "argv", words)
    assert script_arguments(str(SCRIPT)) == words[position:]
