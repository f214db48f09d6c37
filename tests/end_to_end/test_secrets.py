"""Secrets are written nowhere."""

import json

import pytest
from conftest import run_script


@pytest.mark.processes
def test_secrets_are_written_nowhere(flags, tmp_path):
    """Neither to a file nor to the terminal, by a run that finishes and one that fails."""
    canary = "canary-3f9a1c"
    environment = {"WANDB_API_KEY": canary * 4, "HF_TOKEN": canary, "WANDB_MODE": "offline"}
    out = tmp_path / "out"
    arguments = [*flags, f"--output_dir={out}", f"--hub_token={canary}", "--report_to=wandb"]
    done = run_script(arguments, environment=environment)
    assert done.returncode == 0, done.stderr
    failed = run_script([*arguments, "--seed=1"], environment=environment)
    assert failed.returncode == 2
    for text in (done.stdout, done.stderr, failed.stdout, failed.stderr):
        assert canary not in text
    files = [path for path in out.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if canary.encode() in path.read_bytes()]
    assert json.loads((out / "status.json").read_text())["status"] == "finished"
