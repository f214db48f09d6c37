"""A run that is stopped anywhere resumes to the same bits."""

import json
import shutil

import pytest
from conftest import assert_same_run, read_metrics, read_weights, save_tiny_bert
from runs import StopAfter, difference, run, run_until
from transformers import AutoTokenizer, LukeConfig, LukeForSequenceClassification

from lib.checkpoints.checkpoint import TrainingState
from lib.demo.corpus import MODEL_DIR
from lib.errors import InputError, Preempted
from lib.training.timetable import Timetable


@pytest.mark.parametrize("stop", ["step_3", "step_5", "step_7", "step_12", "step_14"])
def test_resuming_gives_the_same_bits(two_epochs, checkpointed, tmp_path, stop):
    """At a logged update, between two, at the end of an epoch, in the next one, and at the end."""
    source = f"--resume_from_checkpoint={checkpointed / stop}"
    run(two_epochs, tmp_path, "--checkpointing_steps=14", source)
    assert_same_run(tmp_path, checkpointed, "step_14")


def test_stopped_at_every_check_it_finishes_with_the_same_bits(two_epochs, checkpointed, tmp_path):
    """After each micro-batch, in each evaluation, again and again, until the run is done."""
    stops = []
    for num_checks in range(2, 100):
        try:
            run(two_epochs, tmp_path, "--checkpointing_steps=14", signals=StopAfter(num_checks))
            break
        except Preempted as stopped:
            stops.append(str(stopped))
            assert json.loads((tmp_path / "status.json").read_text())["status"] == "preempted"
    assert len(stops) > 5
    assert all("stopped by SIGTERM" in line and "run the same command again" in line
               for line in stops)  # fmt: skip
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "finished"
    assert_same_run(tmp_path, checkpointed, "step_14")


def test_a_signal_interrupts_an_evaluation(flags, tmp_path):
    """The run checks twice at the start, after each of 7 updates, and before each of 3 batches."""
    run_until(flags, tmp_path, 10, "--per_device_eval_batch_size=8")
    state = json.loads((tmp_path / "epoch_0" / "training_state.json").read_text())
    assert (state["update"], state["evaluated"]) == (7, 0)


def test_a_signal_before_the_first_update_leaves_nothing(two_epochs, tmp_path):
    assert "before the first update" in run_until(two_epochs, tmp_path, 0)
    assert not list(tmp_path.iterdir())


def test_resuming_with_another_accumulation_keeps_the_batches(flags, tmp_path):
    """The checkpoint lies in the middle of Accelerate's count of micro-batches."""
    run(flags, tmp_path / "whole")
    three = "--gradient_accumulation_steps=3"
    run_until(flags, tmp_path / "out", 14, three)
    assert (tmp_path / "out" / "step_4").is_dir()
    run(flags, tmp_path / "out", "--gradient_accumulation_steps=2")
    rest, once = (read_weights(tmp_path / name / "epoch_0") for name in ("out", "whole"))
    assert difference(rest, once) < 1e-6


def test_gradient_checkpointing_may_change_and_changes_no_bit(two_epochs, checkpointed, tmp_path):
    """With dropout, whose masks the second forward pass of a layer draws again."""
    source = f"--resume_from_checkpoint={checkpointed / 'step_3'}"
    run(two_epochs, tmp_path, source, "--checkpointing_steps=14", "--gradient_checkpointing")
    assert_same_run(tmp_path, checkpointed, "step_14")


def test_rejects_a_checkpoint_of_another_model(flags, tmp_path):
    """Of the same name: the weights in its folder were replaced by those of another size."""
    model = save_tiny_bert(tmp_path / "bert", dropout=0.0)
    more = [f"--model_name_or_path={model}"]
    run_until(flags, tmp_path / "out", 5, *more)
    save_tiny_bert(model, dropout=0.0, num_layers=3)
    with pytest.raises(InputError, match="step_.* does not fit this run: .*encoder.layer.2"):
        run(flags, tmp_path / "out", *more)


def test_drops_a_half_written_line_of_the_log(flags, tmp_path):
    run_until(flags, tmp_path, 7)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 7, "lo')
    run(flags, tmp_path)
    assert [line["update"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 7]


def test_more_epochs_continue_from_the_last(flags, tmp_path, capsys):
    run(flags, tmp_path)
    results = run(flags, tmp_path, "--num_train_epochs=2")
    printed = capsys.readouterr().out
    assert "epoch_0, after update 7" in printed
    assert "num_train_epochs was 1 and is 2 now: from here on the learning rate follows" in printed
    assert results["num_updates"] == 14
    updates = [line["update"] for line in read_metrics(tmp_path) if "loss" in line]
    assert updates == list(range(1, 15))
    with pytest.raises(InputError, match="num_train_epochs 2 there, 1 here"):
        run(flags, tmp_path)


def test_stopped_before_its_first_update_a_resumed_run_keeps_its_source(
    two_epochs, checkpointed, tmp_path
):
    source = tmp_path / "step_9"
    shutil.copytree(checkpointed / "step_9", source)
    run_until(two_epochs, tmp_path / "out", 1, f"--resume_from_checkpoint={source}")
    shutil.rmtree(source)
    run(two_epochs, tmp_path / "out", "--checkpointing_steps=14")
    assert_same_run(tmp_path / "out", checkpointed, "step_14")


def test_test_rows_can_be_added_on_a_resume(flags, files, tmp_path):
    run_until(flags, tmp_path, 3)
    assert run(flags, tmp_path, f"--test_file={files['test']}")["test_num_rows"] == 9


def test_resumes_weights_that_never_get_a_gradient(flags, tmp_path):
    """LUKE has some for entities, which are not among the inputs here."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "entity_vocab_size": 10,
        "entity_emb_size": 16,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LukeForSequenceClassification(LukeConfig(**sizes))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "luke")
    more = [f"--model_name_or_path={tmp_path / 'luke'}"]
    run(flags, tmp_path / "whole", *more)
    run_until(flags, tmp_path / "out", 5, *more)
    run(flags, tmp_path / "out", *more)
    assert_same_run(tmp_path / "out", tmp_path / "whole", "epoch_0")


def test_best_score_and_patience_survive_a_resume(flags, tmp_path):
    """The first evaluation stays the best: with a patience of 3, the fourth is the last."""
    more = ["--learning_rate=0", "--eval_every=1", "--early_stopping_patience=3"]
    more.append("--logging_steps=100")
    for num_checks in (5, 5, 5, 5, 100):
        try:
            results = run(flags, tmp_path, *more, signals=StopAfter(num_checks))
        except Preempted:
            continue
    assert results["num_updates"] == 4
    assert results["best_update"] == 1


@pytest.mark.parametrize(
    ("update", "steps", "expected"),
    [
        (7, None, "epoch_0"),
        (6, None, None),
        (14, "epoch", "epoch_1"),
        (17, "epoch", "epoch_2"),  # the end, in the third epoch
        (6, "3", "step_6"),
        (7, "3", None),
    ],
)
def test_names_of_checkpoints(update, steps, expected):
    assert Timetable(17, 7, None, steps).checkpoint_due(update) == expected


def test_the_first_of_equal_scores_is_the_best():
    state = TrainingState(update=1)
    assert state.record(0.5, lower=False)
    state.update = 2
    assert not state.record(0.5, lower=False)
    assert (state.best_update, state.num_worse, state.evaluated) == (1, 1, 2)
