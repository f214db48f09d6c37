"""Models and data come from the hub whole, at one commit, or not at all."""

import hashlib
import json
import time

import models
import pytest
from conftest import pairs
from hub_server import glue, start_hub
from runs import run
from safetensors import safe_open

from lib.data.sources import read_splits
from lib.errors import InputError
from lib.hub import client
from lib.hub.download import commit_of

TRAIN, VALIDATION = pairs(20, 31), pairs(9, 32)


@pytest.fixture
def hub(bert, monkeypatch, tmp_path):
    """A hub with a model and GLUE, and an empty cache."""
    server = start_hub()
    server.reset()
    server.use(monkeypatch, tmp_path / "home")
    server.add("models/some/bert", bert)
    server.add("datasets/nyu-mll/glue", glue(TRAIN, VALIDATION))
    return server


def load(what):
    """Load the model with its tokenizer, or the data; return the weights or the rows."""
    if what == "data":
        return read_splits("nyu-mll/glue", "mrpc")["train"].rows.to_list()
    model = models.load("some/bert")
    return model.state_dict()["bert.embeddings.word_embeddings.weight"]


def expected(what, bert):
    if what == "data":
        return TRAIN
    with safe_open(bert / "model.safetensors", "pt") as file:
        return file.get_tensor("embeddings.word_embeddings.weight")


FAULTS = {
    401: "the hub answered 401: check the name; a private or gated repository needs a token",
    403: "the hub answered 403: the token has no permission for it",
    404: "the hub answered 404: check the name",
    429: "the hub answered 429: too many requests",
    500: "the hub answered 500: try again later",
    "silent": "the hub was silent for 1 s",
    "stalled": "the hub was silent for 1 s",
    "gone": "the connection to the hub failed",
    "short": "the hub sent a part of a file",
    "corrupt": "came with a wrong checksum: try again",
}
WEIGHTS, ROWS = "GET .*/model.safetensors", "GET .*/train-.*parquet"
ON_THE_WAY = (500, "silent", "stalled", "gone", "short", "corrupt")
ON_FIRST_CONTACT = (401, 403, 404, 429, 500, "silent", "gone")
CASES = [
    *(("model", WEIGHTS, fault) for fault in ON_THE_WAY),
    *(("data", ROWS, fault) for fault in ON_THE_WAY),
    *(("tokenizer", "GET .*/tokenizer.json", fault) for fault in ("gone", "short", "corrupt")),
    *(("model", "some/bert", fault) for fault in ON_FIRST_CONTACT),
    *(("data", "nyu-mll/glue", fault) for fault in ON_FIRST_CONTACT),
]


@pytest.mark.parametrize(("what", "requests", "fault"), CASES)
def test_a_download_that_fails_says_so_in_one_line_and_the_next_succeeds(
    hub, bert, monkeypatch, tmp_path, what, requests, fault
):
    assert client.PATIENCE <= 5
    monkeypatch.setattr(client, "PATIENCE", 1.0)  # else as in the tests of pushes
    hub.fault = (requests, fault)
    started = time.monotonic()
    with pytest.raises(InputError) as failed:
        load(what)
    assert time.monotonic() - started < 3
    flag = "--dataset_name nyu-mll/glue" if what == "data" else "--model_name_or_path some/bert"
    assert str(failed.value).startswith(flag)
    assert FAULTS[fault] in str(failed.value)
    assert "\n" not in str(failed.value)
    for blob in (tmp_path / "home" / "hub").rglob("blobs/*"):
        assert blob.name == named_by_content(blob.read_bytes(), blob.name)
    hub.fault = None
    found, wanted = load(what), expected(what, bert)
    assert found == wanted if what == "data" else found.equal(wanted)


def named_by_content(content, name):
    """The name that the hub gives to this content: SHA-256 if large, else git's SHA-1."""
    if len(name) == 64:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def test_weights_that_are_cached_need_no_hub(hub, bert):
    load("model")
    hub.fault = ("some/bert", 500)
    assert load("model").equal(expected("model", bert))


@pytest.fixture
def arguments(flags):
    kept = [flag for flag in flags if not flag.startswith(("--train_file", "--validation_file"))]
    return [*kept, "--model_name_or_path=some/bert", "--task_name=mrpc"]


def test_a_run_notes_its_commits_and_keeps_to_them(hub, bert, arguments, tmp_path):
    commits = {
        "model_revision": hub.repositories["models/some/bert"].refs["main"],
        "dataset_revision": hub.repositories["datasets/nyu-mll/glue"].refs["main"],
    }
    out = tmp_path / "out"
    run(arguments, out, "--max_train_steps=2", "--checkpointing_steps=1")
    noted = json.loads((out / "manifest.json").read_text())
    assert {name: noted[name] for name in commits} == commits
    # Both branches move: another model, other rows.
    hub.add("models/some/bert", {"config.json": b"{}"})
    moved = hub.add("datasets/nyu-mll/glue", glue(pairs(20, 41), VALIDATION))
    assert commit_of("--dataset_name", "nyu-mll/glue", None) == moved
    run(arguments, out, "--max_train_steps=3", "--checkpointing_steps=1")
    noted = json.loads((out / "manifest.json").read_text())
    assert {name: noted[name] for name in commits} == commits
    with pytest.raises(InputError, match="belongs to another run: model_revision"):
        run(arguments, out, "--max_train_steps=3", "--model_revision=main")


def test_a_revision_is_loaded_whatever_the_main_branch_holds(hub):
    hub.add("datasets/nyu-mll/glue", glue(pairs(30, 41), VALIDATION), branch="v2")
    assert len(read_splits("nyu-mll/glue", "mrpc", revision="v2")["train"].rows) == 30
    assert len(read_splits("nyu-mll/glue", "mrpc")["train"].rows) == 20
    with pytest.raises(InputError, match="the hub answered 404: check the name and the revision"):
        commit_of("--model_name_or_path", "some/bert", "v3")
