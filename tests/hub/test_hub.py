import os
import socket

import pytest
from conftest import run_script

from lib.errors import InputError
from lib.hub.reach import go_offline_if_unreachable


@pytest.fixture
def environment(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def endpoint(server):
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_stays_online_if_the_hub_answers(environment):
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment.setenv("HF_ENDPOINT", endpoint(server))
        go_offline_if_unreachable("some/model", None, "some/data")
    assert "HF_HUB_OFFLINE" not in os.environ


def test_uses_the_cache_without_a_hub(environment, bert, tmp_path, capsys):
    environment.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    (tmp_path / "some___data").mkdir()
    go_offline_if_unreachable(str(bert), None, "some/data")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "the hub does not answer: using what is cached" in capsys.readouterr().err


def test_names_the_remedy_without_hub_and_cache(environment, bert):
    environment.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(InputError, match="some/data is neither.*the same command with --prefetch"):
        go_offline_if_unreachable(str(bert), None, "some/data")


def test_folders_send_no_request(environment, bert, tmp_path):
    environment.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    go_offline_if_unreachable(str(bert), None, str(tmp_path))
    go_offline_if_unreachable(str(bert), None, None)
    assert "HF_HUB_OFFLINE" not in os.environ


def test_a_missing_folder_is_no_name_on_the_hub():
    with pytest.raises(InputError, match="--model_name_or_path ./gone: no such folder"):
        go_offline_if_unreachable("./gone", None, None)


@pytest.mark.processes
def test_loads_a_model_from_the_cache_of_the_hub(flags, bert, tmp_path, monkeypatch):
    """The real loading by name, from a cache laid out as the hub's."""
    revision = "0" * 40
    snapshot = tmp_path / "hub" / "models--some--bert" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for file in bert.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(revision)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    name = "--model_name_or_path=some/bert"
    done = run_script([*flags, name, f"--output_dir={tmp_path / 'out'}", "--max_train_steps=1"])
    assert done.returncode == 0, done.stderr
    assert revision in (tmp_path / "out" / "manifest.json").read_text()
