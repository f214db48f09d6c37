"""The last layer is computed for the first token alone where that changes no result."""

import importlib.util
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from models import load
from test_architectures import ENCODER
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from lib.checkpoints.best_model import BestModel
from lib.model import loading
from lib.model.layers import encoder_layers, is_shortened, shorten_last
from lib.predict.finished_model import read_finished_model


def classifier(kind, **settings):
    """A random one, without dropout, so that results can be compared."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        **ENCODER,
        vocab_size=100,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        chunk_size_feed_forward=4,
        **settings,
    )
    return AutoModelForSequenceClassification.from_config(config).train()


def results(model, mask):
    """The logits, and the gradient of each weight."""
    ids = torch.randint(5, 100, mask.shape, generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=ids * mask, attention_mask=mask).logits
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1])).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return logits, {name: grad for name, grad in gradients.items() if grad is not None}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["bert", "camembert", "electra", "roberta", "xlm-roberta"])
def test_results_are_those_of_transformers(kind, padded, attention):
    mask = torch.ones(3, 12, dtype=torch.int64)
    if padded:
        mask[0, 7:] = mask[2, 3:] = 0
    model = classifier(kind, attn_implementation=attention)
    logits, gradients = results(model, mask)
    model.zero_grad()
    shorten_last(model)
    widths = []
    encoder_layers(model)[-1].register_forward_hook(
        lambda _, inputs, output: widths.append((inputs[0].shape[1], output.shape[1]))
    )
    short_logits, short_gradients = results(model, mask)
    assert widths == [(12, 1)]
    torch.testing.assert_close(short_logits, logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(short_gradients, gradients, rtol=1e-4, atol=1e-7)


class OtherPooling(BertForSequenceClassification):
    """As a model that brings code of its own, which may read all tokens."""


def test_a_changed_forward_pass_keeps_all_tokens(monkeypatch):
    monkeypatch.setattr(BertForSequenceClassification, "forward", lambda self, **inputs: None)
    model = classifier("bert")
    shorten_last(model)
    assert not is_shortened(encoder_layers(model)[-1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: OtherPooling(BertConfig(**ENCODER)),
        lambda: classifier("bert", is_decoder=True),  # its mask is causal
        lambda: classifier("mpnet"),  # its attention has a bias for each place
        lambda: classifier("bert", attn_implementation="flex_attention"),
    ],
    ids=["own code", "decoder", "other layers", "other masks"],
)
def test_other_models_keep_all_tokens(make):
    model = make()
    shorten_last(model)
    assert not any(is_shortened(layer) for layer in encoder_layers(model))


def test_results_with_adapters_are_those_of_transformers(bert):
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    with mock.patch.object(loading, "shorten_last"):
        whole = load(bert, lora_rank=2)
    short = load(bert, lora_rank=2)
    assert [is_shortened(encoder_layers(model)[-1]) for model in (whole, short)] == [False, True]
    mask = torch.ones(3, 12, dtype=torch.int64)
    torch.testing.assert_close(results(short, mask), results(whole, mask), rtol=1e-4, atol=1e-6)


def test_the_best_and_the_finished_model_are_shortened(once):
    place = SimpleNamespace(folder=once, accelerator=SimpleNamespace(device="cpu"))
    best = BestModel.load(place, trust_remote_code=False)
    finished, _ = read_finished_model(once).load(trust_remote_code=False)
    assert [is_shortened(encoder_layers(each)[-1]) for each in (best, finished)] == [True, True]
