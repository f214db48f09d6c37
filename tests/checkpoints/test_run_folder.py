"""What an output folder says of a run that failed, and what it takes to be used."""

import errno
import json

import pytest
from conftest import run_script
from runs import run
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from lib.checkpoints.run_folder import RunFolder
from lib.demo.corpus import MODEL_DIR
from lib.errors import InputError


def status_of(folder):
    return json.loads((folder / "status.json").read_text())


def test_a_run_that_ends_with_a_traceback_has_failed(flags, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no more luck")

    monkeypatch.setattr("train_mrpc.evaluate", broken)
    with pytest.raises(RuntimeError, match="no more luck"):
        run(flags, tmp_path)
    status = status_of(tmp_path)
    assert status["status"] == "failed"
    assert status["reason"] == "RuntimeError: no more luck"
    monkeypatch.undo()
    run(flags, tmp_path)  # and is finished by the same command
    assert status_of(tmp_path)["status"] == "finished"
    assert "reason" not in status_of(tmp_path)


def test_a_folder_is_locked_until_its_run_ends(tmp_path):
    def folder():
        return RunFolder(str(tmp_path / "out"), overwrite=False, resume_from=None)

    with folder() as first:
        first.claim({}, {}, num_checkpoints=0, num_parameters=0)
        with pytest.raises(InputError, match="is in use by another run .process .* on "):
            folder().claim({}, {}, num_checkpoints=0, num_parameters=0)
    folder().claim({}, {}, num_checkpoints=0, num_parameters=0)


@pytest.fixture
def model_with_code(tmp_path):
    """A BERT whose class comes with its folder, as `trust_remote_code` executes it."""
    folder = tmp_path / "own_code"
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=128,
        architectures=["OwnBertForSequenceClassification"],
        auto_map={
            "AutoModelForSequenceClassification": "modeling_own.OwnBertForSequenceClassification"
        },
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"auto_map": config.auto_map, "architectures": config.architectures}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "modeling_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import BertForSequenceClassification\n"
        f"Path({str(tmp_path / 'executed')!r}).touch()\n"
        "class OwnBertForSequenceClassification(BertForSequenceClassification):\n"
        "    pass\n"
    )
    return folder


def test_trusted_code_is_also_loaded_for_the_final_scores(flags, model_with_code, tmp_path):
    arguments = [f"--model_name_or_path={model_with_code}", f"--output_dir={tmp_path / 'out'}"]
    done = run_script([*flags, *arguments, "--trust_remote_code"])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "executed").exists()
    assert (tmp_path / "out" / "modeling_own.py").exists(), "the folder loads by itself"
    assert status_of(tmp_path / "out")["status"] == "finished"


def test_code_that_is_not_trusted_is_not_executed(flags, model_with_code, tmp_path):
    """The folder says it is a BERT, which transformers has code of its own for."""
    run(flags, tmp_path / "out", f"--model_name_or_path={model_with_code}", "--max_train_steps=1")
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out" / "modeling_own.py").exists()


def test_a_file_system_without_locks_is_mentioned_once(tmp_path, monkeypatch, capsys):
    """As some NFS mounts: the run goes on, and the user is asked to start one at a time."""

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with RunFolder(str(tmp_path / "out"), overwrite=False, resume_from=None) as folder:
        for _ in range(2):
            folder.claim({}, {}, num_checkpoints=0, num_parameters=0)
    assert capsys.readouterr().err.count("cannot be locked: start one run at a time") == 1
