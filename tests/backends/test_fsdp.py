"""FSDP2 as its configuration file launches it, on two gloo processes (DTensors)."""

import csv
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from conftest import (
    NUM_VALIDATION,
    ROOT,
    SCRIPT,
    arguments_of,
    assert_same_run,
    kill_all,
    last_update,
    read_weights,
    wait_for,
    workers,
)
from runs import assert_same_course, difference, run
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LukeConfig,
    LukeForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
    pipeline,
)

from lib.backends import fsdp
from lib.checkpoints import manifest as manifests
from lib.demo.corpus import MODEL_DIR
from lib.errors import InputError
from lib.model.layers import encoder_layers, shorten_last

FROZEN = ["--freeze_layers=1", "--class_weights", "1", "3"]
NUM_KILLS = int(os.environ.get("TORTURE_KILLS", "1"))


def start(
    log, *arguments, config="fsdp2", options=("--mixed_precision=no",), script=SCRIPT, **more
):
    """Start the launcher with two processes; append all that they print to `log`."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2"]
    launcher += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml"), *options]
    shim = str(ROOT / "tests" / "backends" / "fsdp_on_cpu.py")
    with log.open("a") as file:
        return subprocess.Popen(
            [*launcher, shim, str(script), *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1", **more},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )


def end_of(process):
    """Return the exit status; a launch that hangs is killed."""
    try:
        return process.wait(200)
    finally:
        if process.poll() is None:
            kill_all(process, 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny random models, without dropout, by name."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
    }
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    torch.manual_seed(0)
    made = {
        "ModernBERT": ModernBertForSequenceClassification(ModernBertConfig(**sizes, **ends)),
        "DeBERTa": DebertaV2ForSequenceClassification(
            DebertaV2Config(**sizes, **dropout, **relative, pooler_hidden_size=32)
        ),
        # Its weights for entities, which are not among the inputs, never get a gradient.
        "LUKE": LukeForSequenceClassification(
            LukeConfig(**sizes, **dropout, entity_vocab_size=10, entity_emb_size=16)
        ),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in made}


@pytest.fixture(scope="module")
def some_epochs(long_flags):
    """Some seconds of training with dropout: 70 updates."""
    return [*long_flags, "--num_train_epochs=10", "--checkpointing_steps=10"]


@pytest.fixture(scope="module")
def runs(flags, some_epochs, models, tmp_path_factory):
    """Folders of runs: under FSDP2, all in one launch, by name; alone also in `one`."""
    folder = tmp_path_factory.mktemp("runs")

    def arguments(name, *more, steps="epoch"):
        return [*flags, f"--output_dir={folder / name}", f"--checkpointing_steps={steps}", *more]

    def resumed(name, source, *more, steps="epoch"):
        source = f"--resume_from_checkpoint={folder / source / 'step_3'}"
        return arguments(name, source, *more, steps=steps)

    of = {name: f"--model_name_or_path={path}" for name, path in models.items()}
    luke = (of["LUKE"], "--eval_every=3")
    run(arguments("one", steps=3), folder / "one")
    for name in ("ModernBERT", "DeBERTa"):
        run(arguments(f"one {name}", of[name]), folder / f"one {name}")
    run(arguments("one frozen", *FROZEN), folder / "one frozen")
    adapters = importlib.util.find_spec("peft") is not None
    if adapters:
        run(arguments("one lora", "--lora_rank=4"), folder / "one lora")
    many = [
        *([arguments("lora", "--lora_rank=4")] if adapters else []),
        arguments("frozen", *FROZEN),
        arguments("frozen interrupted", *FROZEN, steps=3),
        resumed("frozen resumed", "frozen interrupted", *FROZEN),
        arguments("BERT"),
        arguments("accumulated", "--gradient_accumulation_steps=2"),
        arguments("ModernBERT", of["ModernBERT"]),
        arguments("DeBERTa", of["DeBERTa"]),
        arguments("interrupted", steps=3),
        resumed("from one", "one"),
        arguments("LUKE", *luke, steps=3),
        resumed("LUKE resumed", "LUKE", *luke, steps=3),
        arguments_of(some_epochs, folder / "dropout"),
        [*arguments_of(some_epochs, folder / "recomputed"), "--gradient_checkpointing"],
    ]
    (folder / "runs.json").write_text(json.dumps(many))
    worker = ROOT / "tests" / "end_to_end" / "worker.py"
    log = folder / "log"
    assert end_of(start(log, folder / "runs.json", script=worker)) == 0, log.read_text()
    run(resumed("to one", "interrupted"), folder / "to one")
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("name", ["BERT", "accumulated", "from one", "to one"])
def test_the_shards_take_the_course_of_one_process(runs, once, name):
    """Also in two micro-batches, resumed from a checkpoint of one process, and by one of theirs."""
    assert_same_course(runs / name, once)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["ModernBERT", "DeBERTa"])
def test_other_models_take_the_course_of_one_process(runs, name):
    assert_same_course(runs / name, runs / f"one {name}")


@pytest.mark.processes
@pytest.mark.parametrize("name", ["frozen", "frozen resumed"])
def test_frozen_layers_and_weighted_classes_take_the_course_of_one_process(runs, name):
    assert_same_course(runs / name, runs / "one frozen")
    moments = load_file(runs / name / "epoch_0" / "optimizer.safetensors")
    assert not [weight for weight in moments if "embeddings" in weight or "layer.0." in weight]


@pytest.mark.processes
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_adapters_take_the_course_of_one_process(runs):
    """The best model is merged from shards."""
    assert_same_course(runs / "lora", runs / "one lora")
    assert difference(read_weights(runs / "lora"), read_weights(runs / "one lora")) < 1e-6


@pytest.mark.processes
def test_resumes_weights_that_never_get_a_gradient(runs):
    """Without moments for them, which PyTorch would make up."""
    assert_same_run(runs / "LUKE resumed", runs / "LUKE", "step_6")


def predictions(folder):
    lines = (folder / "predictions" / "validation.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.processes
def test_evaluates_every_row_once(runs, once):
    written = predictions(runs / "BERT")
    assert [row["index"] for row in written] == list(range(NUM_VALIDATION))
    assert [row["label"] for row in written] == [row["label"] for row in predictions(once)]


@pytest.mark.processes
def test_exports_what_transformers_loads(runs, files):
    folder = runs / "BERT"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert difference(model.state_dict(), read_weights(folder / "epoch_0")) == 0
    with files["validation"].open() as file:
        rows = [{"text": r["sentence1"], "text_pair": r["sentence2"]} for r in csv.DictReader(file)]
    answers = pipeline("text-classification", str(folder))(rows)
    written = predictions(folder)
    assert [row["label"] for row in answers] == [row["prediction"] for row in written]


@pytest.mark.processes
def test_gradient_checkpointing_does_not_change_a_bit(runs):
    """With dropout, whose masks the second forward pass of a layer draws again."""
    assert_same_run(runs / "recomputed", runs / "dropout", "step_70")


@pytest.fixture(scope="module")
def preempted(some_epochs, tmp_path_factory):
    """The folder of a run that a SIGTERM to one rank stopped, and what it printed."""
    folder = tmp_path_factory.mktemp("preempted")
    process = start(folder / "log", *arguments_of(some_epochs, folder / "out"))
    wait_for(lambda: last_update(folder / "out") > 0)
    os.kill(workers(process.pid)[1], signal.SIGTERM)
    assert end_of(process) != 0
    return folder / "out", (folder / "log").read_text()


@pytest.mark.processes
def test_a_signal_to_one_rank_stops_both_after_saving(preempted):
    folder, printed = preempted
    status = json.loads((folder / "status.json").read_text())
    assert status["status"] == "preempted"
    assert (folder / f"step_{status['update']}" / "manifest.json").exists()
    assert printed.count("train_mrpc.py: stopped by SIGTERM after update") == 1
    assert "exitcode  : 75" in printed


@pytest.mark.processes
def test_killed_anywhere_the_result_is_the_same(preempted, some_epochs, runs, tmp_path):
    """SIGKILL to all processes at random moments, then the same command until the run ends."""
    moments, log, kills = random.Random("shards"), tmp_path / "log", 0
    folder = shutil.copytree(preempted[0], tmp_path / "preempted")
    while kills < NUM_KILLS:
        arguments = arguments_of(some_epochs, folder)
        while kills < NUM_KILLS and killed(arguments, log, moments.uniform(0, 2)):
            kills += 1
        if kills == NUM_KILLS:
            assert end_of(start(log, *arguments)) == 0, log.read_text()
        assert_same_run(folder, runs / "dropout", "step_70")
        folder = tmp_path / f"after {kills} kills"


def killed(arguments, log, seconds):
    """Kill a run `seconds` after it begins to train; return False if it ended before."""
    length = log.stat().st_size if log.exists() else 0
    process = start(log, *arguments)
    trains = re.compile(r"^update \d|resuming from", re.MULTILINE)
    wait_for(lambda: trains.search(log.read_text()[length:]) or process.poll() is not None)
    time.sleep(seconds)
    if process.poll() is not None:
        assert process.returncode == 0, log.read_text()
        return False
    kill_all(process, 2)
    return True


# One run as shipped, in bf16, whose moments are the gradients of its last update.
NAN_RUNS = {
    "fsdp2": ["--adam_beta1=0", "--max_grad_norm=0"],
    "multi_cpu": [],
}


@pytest.fixture(scope="module")
def with_nan(flags, tmp_path_factory):
    """Folders of runs with a NaN on one rank in update 4, and what they printed."""
    folder = tmp_path_factory.mktemp("nan")
    printed = {}
    for config, more in NAN_RUNS.items():
        arguments = [*flags, *more, f"--output_dir={folder / config}", "--checkpointing_steps=3"]
        arguments.append("--logging_steps=100")
        process = start(folder / f"{config}.log", *arguments, config=config, options=(), NAN_AT="4")
        assert end_of(process) != 0
        printed[config] = (folder / f"{config}.log").read_text()
    return folder, printed


@pytest.mark.processes
@pytest.mark.parametrize("config", NAN_RUNS)
def test_a_nan_on_one_rank_ends_the_run_and_poisons_nothing(with_nan, config):
    """It is found at the next checkpoint, two updates later."""
    folder, printed = with_nan[0] / config, with_nan[1][config]
    (line,) = (line for line in printed.splitlines() if "train_mrpc.py: error:" in line)
    assert "gradient of update 4 is not finite" in line
    assert "[rank" not in printed, "a traceback"
    assert json.loads((folder / "status.json").read_text())["status"] == "failed"
    assert list(manifests.owned(folder)) == [folder / "step_3"]
    manifests.verify(folder / "step_3")
    for file in ("model", "optimizer"):
        for value in load_file(folder / "step_3" / f"{file}.safetensors").values():
            assert value.isfinite().all()


@pytest.mark.processes
def test_bf16_keeps_weights_in_fp32_and_sums_gradients_in_fp32(with_nan):
    """The sum of two bf16 gradients is seldom one."""
    folder = with_nan[0] / "fsdp2" / "step_3"
    assert json.loads((folder / "manifest.json").read_text())["run"]["precision"] == "bf16"
    moments = load_file(folder / "optimizer.safetensors")
    gradients = {name: value for name, value in moments.items() if name.endswith(".exp_avg")}
    for values in (read_weights(folder), gradients):
        assert {value.dtype for value in values.values()} == {torch.float32}
        every = torch.cat([value.flatten() for value in values.values()])
        assert (every.bfloat16().float() != every).float().mean() > 0.2


def configured(model, policy="TRANSFORMER_BASED_WRAP", **options):
    """Return FSDP's settings for a model, as they are before `prepare`."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=policy, **options)
    state = SimpleNamespace(fsdp_plugin=plugin)
    fsdp.configure(
        SimpleNamespace(distributed_type=DistributedType.FSDP, state=state), model, encoder_layers
    )
    return plugin


@pytest.fixture(scope="module")
def bert_model(bert):
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    shorten_last(model)
    return model


def test_shards_the_encoder_layers_unless_the_user_names_others(bert_model):
    assert configured(bert_model).transformer_cls_names_to_wrap == ["BertLayer"]
    named = configured(bert_model, transformer_cls_names_to_wrap=["BertAttention"])
    assert named.transformer_cls_names_to_wrap == ["BertAttention"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transformer_cls_names_to_wrap": ["T5Block"]}, "BertForSequenceClassification has no"),
        ({"transformer_cls_names_to_wrap": ["BertEmbeddings", "BertLayer"]}, "word embeddings"),
    ],
)
def test_refuses_what_cannot_be_sharded(bert_model, options, message):
    with pytest.raises(InputError, match=message):
        configured(bert_model, **options)


def test_refuses_weights_that_two_modules_share():
    sizes = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    model = T5ForSequenceClassification(T5Config(vocab_size=32, **sizes))
    with pytest.raises(InputError, match=r"embed_tokens.weight is also the weight of another"):
        configured(model)


def test_a_model_without_a_stack_of_layers_is_not_sharded_by_layers(bert_model, monkeypatch):
    monkeypatch.setattr(bert_model.bert, "encoder", torch.nn.Identity())
    with pytest.raises(InputError, match="has no stack of layers.*fsdp_auto_wrap_policy: NO_WRAP"):
        configured(bert_model)
    configured(bert_model, policy="NO_WRAP")
