"""LoRA through peft: what is trained, what checkpoints hold, and what users load."""

import importlib.util
import json

import pytest
import torch
from conftest import NUM_VALIDATION, assert_same_run, pairs, read_weights
from models import load, tokenizer_of
from runs import assert_same_course, error_line, run, run_and_exit
from safetensors.torch import load_file
from test_architectures import saved  # noqa: F401
from transformers import AutoModelForSequenceClassification, pipeline

from lib.checkpoints import best_model
from lib.model.adapters import merge_adapters

with_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed"
)
LORA = ["--lora_rank=4", "--lora_alpha=16", "--checkpointing_steps=3", "--max_train_steps=6"]


@with_peft
def test_only_adapters_and_the_classifier_are_trained(bert):
    model = load(bert, lora_rank=4)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    adapters = {name for name in trained if ".lora_" in name}
    assert trained - adapters == {"classifier.weight", "classifier.bias"}
    # Six linear layers in each of two layers, and the pooler; A and B of each.
    assert len(adapters) == 2 * (2 * 6 + 1)
    shapes = {tuple(model.get_parameter(name).shape) for name in adapters if "query" in name}
    assert shapes == {(4, 32), (32, 4)}
    plain = load(bert).state_dict()
    merged = merge_adapters(model, model.state_dict())
    assert merged.keys() == plain.keys()
    assert all(torch.equal(merged[name], plain[name]) for name in plain)  # B is 0 at first


@with_peft
@torch.no_grad()
@pytest.mark.parametrize("kind", ["roberta", "distilbert", "gpt2", "bart", "t5", "xlnet"])
def test_merged_weights_compute_the_same(kind, saved):  # noqa: F811
    """GPT-2 keeps its matrices transposed."""
    model, plain = load(saved / kind, lora_rank=2, lora_alpha=3), load(saved / kind)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight)
    tokens = tokenizer_of(saved / kind)("they sold it", "it was sold", return_tensors="pt")
    before = plain(**tokens).logits
    plain.load_state_dict(merge_adapters(model, model.state_dict()))
    torch.testing.assert_close(plain(**tokens).logits, model(**tokens).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain(**tokens).logits, before, atol=1e-3)


@with_peft
def test_merging_is_that_of_peft(bert):
    from peft.tuners.lora import LoraLayer

    model = load(bert, lora_rank=4, lora_alpha=6)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight)
    merged = merge_adapters(model, model.state_dict())
    for name, part in model.named_modules():
        if isinstance(part, LoraLayer):
            part.merge()
            torch.testing.assert_close(merged[f"{name}.weight"], part.base_layer.weight.data)


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    run([*flags, *LORA], folder)
    return folder


@with_peft
def test_a_resumed_run_has_the_same_bits(flags, whole, tmp_path):
    run([*flags, *LORA], tmp_path, f"--resume_from_checkpoint={whole / 'step_3'}")
    assert_same_run(tmp_path, whole, "step_6")


@with_peft
def test_checkpoints_hold_adapters_and_the_output_merged_weights(whole, bert):
    weights = load_file(whole / "step_6" / "model.safetensors")
    query = "bert.encoder.layer.1.attention.self.query"
    base, down, up = (
        weights[f"{query}.{part}.weight"]
        for part in ("base_layer", "lora_A.default", "lora_B.default")
    )
    assert torch.equal(base, load(bert).state_dict()[f"{query}.weight"])
    assert up.abs().max() > 0
    moments = load_file(whole / "step_6" / "optimizer.safetensors")
    assert {name.rpartition(".")[0] for name in moments} == {
        name for name in weights if ".lora_" in name or name.startswith("classifier.")
    }
    final = AutoModelForSequenceClassification.from_pretrained(whole)
    assert json.loads((whole / "all_results.json").read_text())["best_update"] == 6
    assert read_weights(whole).keys() == load(bert).state_dict().keys()
    merged = base + (up @ down) * 16 / 4
    torch.testing.assert_close(final.state_dict()[f"{query}.weight"], merged)


@with_peft
def test_the_pipeline_loads_the_output_and_predicts_the_same(whole):
    classify = pipeline("text-classification", str(whole), top_k=None)
    rows = pairs(NUM_VALIDATION, 12)
    texts = [{"text": row["sentence1"], "text_pair": row["sentence2"]} for row in rows]
    lines = (whole / "predictions" / "validation.jsonl").read_text().splitlines()
    for answer, line in zip(classify(texts), map(json.loads, lines), strict=True):
        scores = {label["label"]: label["score"] for label in answer}
        assert scores == pytest.approx(line["probabilities"], abs=1e-5)


@with_peft
@pytest.mark.processes
def test_training_takes_the_same_course_on_two_processes(flags, run_on, tmp_path):
    common = [*flags, "--lora_rank=4", "--checkpointing_steps=epoch", "--gradient_checkpointing"]
    run(common, tmp_path / "1")
    run_on(2, [*common, f"--output_dir={tmp_path / '2'}"])
    assert_same_course(tmp_path / "2", tmp_path / "1")


def test_merging_leaves_a_model_without_adapters_alone(bert):
    model = load(bert)
    weights = model.state_dict()
    merged = best_model.merge_adapters(model, weights)
    assert list(merged) == list(weights)
    assert all(merged[name] is weights[name] for name in weights)


def test_without_peft_one_line_names_the_package(flags, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "peft" else find(name, *more),
    )
    assert run_and_exit(flags, tmp_path / "out", "--lora_rank=4") == 2
    assert "--lora_rank 4 needs the package peft: pip install peft" in error_line(
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora_alpha=4"], "--lora_alpha without --lora_rank"),
        (
            ["--lora_rank=4", "--freeze_layers=1"],
            "freezes all pretrained layers: leave --freeze_la",
        ),
        (
            ["--lora_rank=4", "--reinit_layers=1"],
            "freezes all pretrained layers: leave --reinit_la",
        ),
        (["--lora_rank=0"], "--lora_rank must be at least 1"),
    ],
)
def test_rejects_flags_that_contradict_adapters(more, message, flags, tmp_path, capsys):
    assert run_and_exit(flags, tmp_path / "out", *more) == 2
    assert message in error_line(capsys.readouterr().err)
