"""A finished run goes to the hub in one commit, and is used from there."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
from conftest import run_script, start_script, wait_for
from hub_server import TOKEN, start_hub
from runs import error_line, run

from lib.cli.startup import exit_status, start
from lib.hub.upload import pushed_files
from lib.publish import main as publish

MODEL = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def hub():
    server = start_hub()
    server.reset()
    return server


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    hub.use(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def finished(flags, hub, tmp_path_factory):
    """The folder of a run that pushed itself, its commit, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "pushed"
    arguments = [*flags, f"--output_dir={folder}", "--push_to_hub", "--hub_private"]
    arguments += ["--checkpointing_steps=epoch", "--report_to=tensorboard"]
    home = tmp_path_factory.mktemp("home")
    done = run_script([*arguments, f"--hub_token={TOKEN}"], environment=hub.environment(home))
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.processes
def test_a_run_pushes_what_users_of_the_model_need_and_nothing_else(finished, hub):
    folder, done = finished
    repository = hub.repositories["models/me/pushed"]
    commit = repository.refs["main"]
    assert f"pushed: {hub.endpoint}/me/pushed/commit/{commit}" in done.stdout.splitlines()[-1]
    files = repository.commits[commit]
    plots = {f"report/{path.name}" for path in (folder / "report").glob("*.png")}
    others = {"README.md", "all_results.json", "report/index.html", ".gitattributes"}
    assert set(files) == {*MODEL, *others, *plots}
    assert len(repository.commits) == 2  # the empty one of the hub, and one for all files
    assert repository.private
    for path in set(files) - {".gitattributes"}:
        assert files[path] == (folder / path).read_bytes(), path
    assert (folder / "epoch_0" / "optimizer.safetensors").exists()


@pytest.mark.processes
def test_the_pushed_model_predicts_what_the_run_predicted(finished, hub, files, tmp_path):
    folder, _ = finished
    code = """
import csv, json, sys
from transformers import pipeline
classify = pipeline("text-classification", "me/pushed", truncation=True, max_length=64)
rows = list(csv.DictReader(open(sys.argv[1])))
pairs = [{"text": row["sentence1"], "text_pair": row["sentence2"]} for row in rows]
print(json.dumps(classify(pairs, top_k=None)))
"""
    environment = {**os.environ, **hub.environment(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(files["validation"])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    lines = (folder / "predictions" / "validation.jsonl").read_text().splitlines()
    assert len(found) == len(lines) == 23
    for scores, line in zip(found, map(json.loads, lines), strict=True):
        by_label = {score["label"]: score["score"] for score in scores}
        assert by_label == pytest.approx(line["probabilities"], abs=1e-5)
        assert max(by_label, key=by_label.get) == line["prediction"]


@pytest.mark.processes
def test_the_token_stands_in_no_file_and_no_output(finished, hub):
    folder, done = finished
    sent = {headers.get("authorization") for method, path, headers in hub.requests
            if path.startswith("/api/models/me/pushed/commit")}  # fmt: skip
    assert f"Bearer {TOKEN}" in sent
    assert TOKEN not in done.stdout + done.stderr
    for path in folder.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.processes
def test_the_token_does_not_stay_in_the_process_list(flags, tmp_path):
    log = tmp_path / "log"
    arguments = [*flags, f"--output_dir={tmp_path}/out", "--hub_token", TOKEN]
    process = start_script(arguments, log=log)
    try:
        wait_for(lambda: "train_mrpc: " in log.read_text())
        shown = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert b"--hub_token\0***" in shown
        assert TOKEN.encode() not in shown
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.processes
def test_a_token_that_the_launcher_shows_is_refused(flags, tmp_path):
    arguments = [*flags, f"--output_dir={tmp_path}/out", f"--hub_token={TOKEN}"]
    done = run_script(arguments, num_processes=2)
    assert done.returncode != 0
    assert "--hub_token stands in the process list" in done.stderr
    assert not (tmp_path / "out").exists()


FAULTS = {
    401: "the hub answered 401: check the name; a private or gated repository needs a token",
    403: "the hub answered 403: the token has no permission for it",
    404: "the hub answered 404: check the name",
    429: "the hub answered 429: too many requests",
    500: "the hub answered 500: try again later",
    "silent": "the hub was silent for 4 s",
    "gone": "the connection to the hub failed",
}
STAGES = ("POST /api/repos/create", "POST .*/preupload/", "PUT /lfs/", "POST .*/commit/")


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        *((STAGES[3], fault) for fault in FAULTS),
        *((stage, fault) for stage in STAGES[:3] for fault in (403, 500, "gone")),
        (STAGES[2], "silent"),
    ],
)
def test_a_push_that_fails_says_so_in_one_line_and_the_next_succeeds(
    finished, hub, online, monkeypatch, capsys, stage, fault
):
    folder, _ = finished
    name = f"me/{''.join(filter(str.isalpha, stage))}-{fault}".lower()
    hub.objects.clear()
    monkeypatch.setattr(hub, "fault", (stage, fault))
    started = time.monotonic()
    assert publish([str(folder), f"--hub_model_id={name}"]) == 1
    assert time.monotonic() - started < 6
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name} was not pushed: {FAULTS[fault]}" in line
    assert line.endswith(f"to push it: python -m lib.publish {folder}")
    there = hub.repositories.get(f"models/{name}")
    assert there is None or set(there.commits[there.refs["main"]]) == {".gitattributes"}
    monkeypatch.setattr(hub, "fault", None)
    assert publish([str(folder), f"--hub_model_id={name}"]) == 0
    there = hub.repositories[f"models/{name}"]
    assert set(MODEL) < set(there.commits[there.refs["main"]])


def test_a_run_whose_push_fails_is_complete_on_disk(
    flags, hub, online, monkeypatch, capsys, tmp_path
):
    folder = tmp_path / "out"
    monkeypatch.setattr(hub, "fault", ("POST /api/repos/create", 403))
    push = ["--push_to_hub", "--hub_model_id=team/model"]
    # The stop signals would stay ignored in this process.
    with (
        mock.patch("lib.cli.startup.ignore_stop_signals"),
        pytest.raises(SystemExit) as left,
        exit_status(),
    ):
        run(flags, folder, *push, report=True)
    assert left.value.code == 1
    line = error_line(capsys.readouterr().err)
    assert line.endswith(f"to push it: python -m lib.publish {folder}")
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    monkeypatch.setattr(hub, "fault", None)
    assert publish([str(folder)]) == 0  # it has the repository from the folder
    assert "/team/model/commit/" in capsys.readouterr().out


def test_a_branch_and_a_pull_request_leave_the_main_branch_alone(finished, hub, online, capsys):
    folder, _ = finished
    name = "--hub_model_id=me/branches"
    assert publish([str(folder), name, "--hub_revision=v1"]) == 0
    capsys.readouterr()
    assert publish([str(folder), name, "--hub_create_pr"]) == 0
    assert capsys.readouterr().out.strip() == f"{hub.endpoint}/me/branches/discussions/1"
    repository = hub.repositories["models/me/branches"]
    files = {name: set(repository.commits[commit]) for name, commit in repository.refs.items()}
    assert files["main"] == {".gitattributes"}
    assert files["v1"] == files["refs/pr/1"]
    assert set(MODEL) < files["v1"]


def test_what_cannot_be_pushed_is_known_before_the_training(online, monkeypatch, capsys, tmp_path):
    arguments = ["--demo", f"--output_dir={tmp_path}/out", "--push_to_hub"]

    def error(*more):
        with pytest.raises(SystemExit) as left:
            start(["train_mrpc.py", *arguments, *more])
        assert left.value.code == 2
        return error_line(capsys.readouterr().err)

    assert "--hub_model_id a/b/c is no name" in error("--hub_model_id=a/b/c")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE rules out: train without --push_to_hub" in error()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "needs a token: set HF_TOKEN" in error()
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_finished_run_is_refused(once, tmp_path):
    assert publish([str(tmp_path)]) == 2
    copy = tmp_path / "copy"
    shutil.copytree(once, copy)
    assert publish([str(copy)]) == 2  # `once` has no model card


def test_weights_in_shards_and_code_that_was_trusted_are_pushed(tmp_path):
    names = ["config.json", "README.md", "all_results.json", "model.safetensors", "modeling_x.py"]
    names += ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "vocab.txt"]
    left = ["config.yaml", "manifest.json", "status.json", "optimizer.safetensors", "wandb_run_id"]
    for name in (*names, *left):
        (tmp_path / name).touch()
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "model.safetensors").touch()
    assert [path.name for path in pushed_files(tmp_path)] == sorted(names)
