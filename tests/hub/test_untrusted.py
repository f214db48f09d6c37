"""Nothing that comes from the hub is executed: each payload would leave a folder behind."""

import json
import os
import pickle

import models
import pytest
from conftest import pairs
from hub_server import glue, start_hub
from runs import run

from lib.data.sources import read_splits
from lib.errors import InputError


@pytest.fixture
def trace(tmp_path):
    """The folder that a payload would make."""
    return tmp_path / "executed"


@pytest.fixture
def hub(bert, monkeypatch, tmp_path):
    server = start_hub()
    server.reset()
    server.use(monkeypatch, tmp_path / "home")
    monkeypatch.setattr("sys.stdin", None)  # nobody is there to be asked for trust
    server.add("models/some/bert", bert)
    return server


def payload(trace):
    return f"import os; os.mkdir({str(trace)!r})\n".encode()


class Payload:
    """What a pickle executes when it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_the_payloads_work(trace):
    exec(payload(trace))
    assert trace.exists()
    trace.rmdir()
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists()


def test_code_of_a_model_is_not_executed(hub, bert, trace):
    """Known architecture or not: `modeling_evil.py`, named by `auto_map`, stays where it is."""
    config = json.loads((bert / "config.json").read_text())
    for model_type in ("bert", "evil"):
        config |= {
            "model_type": model_type,
            "auto_map": {
                "AutoConfig": "modeling_evil.Config",
                "AutoModelForSequenceClassification": "modeling_evil.Model",
            },
        }
        name = f"some/{model_type}-with-code"
        files = {path.name: path.read_bytes() for path in bert.iterdir()}
        files |= {"config.json": json.dumps(config).encode(), "modeling_evil.py": payload(trace)}
        hub.add(f"models/{name}", files)
        if model_type == "bert":  # the library's own class
            assert type(models.load(name)).__module__.startswith("transformers.models.bert")
        else:
            with pytest.raises(InputError, match=f"--model_name_or_path {name}"):
                models.load(name)
    assert not trace.exists()
    assert not [path for _, path, _ in hub.requests if path.endswith(".py")]


def test_code_of_a_tokenizer_is_not_executed(hub, bert, trace):
    config = json.loads((bert / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Tokenizer", None]}
    files = {
        "tokenizer_config.json": json.dumps(config).encode(),
        "tokenization_evil.py": payload(trace),
    }
    hub.add("models/some/bert", files)
    models.load("some/bert")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_in_place_of_safetensors_is_not_read(hub, bert, trace, name):
    files = {path.name: path.read_bytes() for path in bert.iterdir()}
    del files["model.safetensors"]
    hub.add("models/some/pickle", {**files, name: pickle.dumps(Payload(trace))})
    with pytest.raises(InputError) as refused:
        models.load("some/pickle")
    assert "model.safetensors" in str(refused.value) or "damaged" in str(refused.value)
    if name == "pytorch_model.bin":
        assert "(found: pytorch_model.bin, which may execute code)" in str(refused.value)
    assert not trace.exists()


def test_the_script_of_a_data_set_is_not_executed(hub, trace):
    files = {"glue.py": payload(trace)}
    hub.add("datasets/nyu-mll/glue", {**glue(pairs(20, 1), pairs(9, 2)), **files})
    with pytest.raises(InputError, match="nyu-mll/glue .* scripts are no longer supported"):
        read_splits("nyu-mll/glue", "mrpc")
    assert not trace.exists()


def test_the_script_of_a_metric_is_not_executed(hub, flags, trace, monkeypatch, tmp_path):
    """Neither one from the hub nor one in the folder where a run starts."""
    for name in ("accuracy", "f1", "glue"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_bytes(payload(trace))
    monkeypatch.chdir(tmp_path)
    assert "eval_accuracy" in run(flags, tmp_path / "out", "--max_train_steps=1")
    assert not trace.exists()
    assert hub.requests == []
