"""What is frozen keeps its bits, has no moments, and does not stand in the way of a resumed run."""

import pytest
import torch
from conftest import assert_same_run, read_weights
from models import load
from runs import error_line, run, run_and_exit
from safetensors.torch import load_file
from test_architectures import saved  # noqa: F401
from transformers import BertForSequenceClassification

from lib.errors import InputError
from lib.model.layers import encoder_layers


def frozen(model):
    return {name for name, weight in model.named_parameters() if not weight.requires_grad}


@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_freezes_the_embeddings_and_the_lowest_layers(bert, num_layers):
    model = load(bert, freeze_layers=num_layers)
    parts = ["bert.embeddings.", *(f"bert.encoder.layer.{n}." for n in range(num_layers))]
    expected = {name for name in model.state_dict() if name.startswith(tuple(parts))}
    assert frozen(model) == expected
    assert frozen(load(bert)) == set()


EMBEDDINGS = {
    "roberta": "roberta.embeddings.",
    "distilbert": "distilbert.embeddings.",
    "electra": "electra.embeddings",  # and the projection of the embeddings
    "modernbert": "model.embeddings.",
    "gpt2": "transformer.w",
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_freezes_the_embeddings_of_other_architectures(kind, saved):  # noqa: F811
    """Their weights alone: not a normalization above the layers, as ModernBERT and GPT-2 have."""
    found = frozen(load(saved / kind, freeze_layers=0))
    model = load(saved / kind)
    expected = {n for n, _ in model.named_parameters() if n.startswith(EMBEDDINGS[kind])}
    assert found == expected
    top = len(encoder_layers(model))
    rest = {
        n for n, w in load(saved / kind, freeze_layers=top).named_parameters() if w.requires_grad
    }
    in_layers = {id(w) for w in encoder_layers(model).parameters()}
    assert rest == {
        n for n, w in model.named_parameters() if id(w) not in in_layers and n not in expected
    }


@pytest.mark.processes
def test_frozen_weights_stay_as_they_are_on_two_processes(flags, bert, run_on, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    common = [
        *flags,
        "--freeze_layers=1",
        "--checkpointing_steps=3",
        "--max_train_steps=6",
        "--gradient_checkpointing",
    ]
    start = f"--resume_from_checkpoint={whole / 'step_3'}"
    run_on(2, [*common, f"--output_dir={whole}"], [*common, f"--output_dir={resumed}", start])
    assert_frozen(whole, bert)
    assert_same_run(resumed, whole, "step_6")


def test_a_resumed_run_has_the_same_bits(flags, bert, tmp_path, capsys):
    common = [*flags, "--freeze_layers=1", "--checkpointing_steps=3", "--max_train_steps=6"]
    run(common, tmp_path / "whole")
    assert "parameters are trained, the others are frozen" in capsys.readouterr().err
    run(common, tmp_path / "resumed", f"--resume_from_checkpoint={tmp_path / 'whole' / 'step_3'}")
    assert_frozen(tmp_path / "whole", bert)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole", "step_6")


def assert_frozen(folder, bert):
    before, after = load(bert).state_dict(), read_weights(folder / "step_6")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    pooler_and_layer = {n for n in changed if "bert.pooler" in n or "encoder.layer.1." in n}
    assert pooler_and_layer
    assert changed == pooler_and_layer | {n for n in changed if n.startswith("classifier.")}
    moments = load_file(folder / "step_6" / "optimizer.safetensors")
    assert not [name for name in moments if "embeddings" in name or "layer.0." in name]
    assert "bert.encoder.layer.1.output.dense.weight.exp_avg" in moments


def test_rejects_more_layers_than_there_are(bert):
    with pytest.raises(InputError, match="--freeze_layers 3: the model has 2 encoder layers"):
        load(bert, freeze_layers=3)
    with pytest.raises(
        InputError, match="--freeze_layers 2 and --reinit_layers 1: the model has 2"
    ):
        load(bert, freeze_layers=2, reinit_layers=1)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_attention_is_computed_as_asked(bert, name):
    model = load(bert, attn_implementation=name)
    assert model.config._attn_implementation == name
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.no_grad():
        logits = [each(input_ids=ids).logits for each in (model, load(bert))]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_rejects_attention_that_model_or_machine_does_not_have(bert, saved, monkeypatch):  # noqa: F811
    with pytest.raises(InputError, match="flash_attention_2: the package of that name is not ins"):
        load(bert, attn_implementation="flash_attention_2")
    monkeypatch.setattr(BertForSequenceClassification, "_supports_sdpa", False)
    with pytest.raises(InputError, match="sdpa: BertForSequenceClassification does not have it on"):
        load(bert, attn_implementation="sdpa")
    with pytest.raises(InputError, match="sdpa: DebertaV2ForSequenceClassification does not have"):
        load(saved / "deberta-v2", attn_implementation="sdpa")


def test_a_kernel_of_the_hub_is_no_attention(flags, tmp_path, capsys):
    """Its code would be downloaded and executed."""
    flag = "--attn_implementation=kernels-community/flash-attn2"
    assert run_and_exit(flags, tmp_path / "out", flag) == 2
    assert "--attn_implementation must be one of eager, sdpa" in error_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
