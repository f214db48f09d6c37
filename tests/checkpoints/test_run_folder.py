"""What an output folder says of a run that failed, and what it takes to be used."""

import errno
import json

import pytest
from conftest import assert_same_run, run_script
from runs import run, run_until
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from lib.checkpoints.run_folder import RunFolder
from lib.demo.corpus import MODEL_DIR
from lib.errors import InputError, LostProcessError


def status_of(folder):
    return json.loads((folder / "status.json").read_text())


def test_a_run_that_ends_with_a_traceback_has_failed(flags, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no more luck")

    monkeypatch.setattr("train_mrpc.evaluate", broken)
    with pytest.raises(RuntimeError, match="no more luck"):
        run(flags, tmp_path, "--checkpointing_steps=3")
    status = status_of(tmp_path)
    assert status["status"] == "failed"
    assert status["reason"] == "RuntimeError: no more luck"
    assert status["update"] == 6, "that of the newest checkpoint"
    monkeypatch.undo()
    run(flags, tmp_path, "--checkpointing_steps=3")  # finished by the same command
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


def test_a_run_that_lost_a_process_is_one_to_start_again(tmp_path):
    def lose_a_process():
        with RunFolder(str(tmp_path), overwrite=False, resume_from=None) as folder:
            folder.claim({}, {}, num_checkpoints=0, num_parameters=0)
            raise LostProcessError("lost rank 1")

    with pytest.raises(LostProcessError):
        lose_a_process()
    assert status_of(tmp_path)["status"] == "running"


def test_a_restart_resumes_instead_of_overwriting_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for restarts in ("0", "1"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        with RunFolder(str(tmp_path), overwrite=True, resume_from=None) as folder:
            folder.claim({"seed": 1}, {}, num_checkpoints=0, num_parameters=0)
        assert folder.overwrite == (restarts == "0")
    said = capsys.readouterr().err
    assert said.count("restarted by the launcher: resuming instead of overwriting") == 1


def test_an_output_folder_below_a_file(flags, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file is a file; choose another folder"):
        run(flags, tmp_path / "file" / "out")


def test_weights_that_share_memory_are_saved_and_resumed(flags, tmp_path):
    """As the embeddings of BART, which its encoder and decoder share."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=tokenizer.sep_token_id,
    )
    BartForSequenceClassification(config).model.save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    more = [f"--model_name_or_path={tmp_path / 'bart'}", "--text_columns=sentence1"]
    run(flags, tmp_path / "whole", *more)
    run_until(flags, tmp_path / "out", 5, *more)
    run(flags, tmp_path / "out", *more)
    assert_same_run(tmp_path / "out", tmp_path / "whole", "epoch_0")
