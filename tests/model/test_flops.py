"""FLOPs by formula are those of the matrix products that PyTorch counts."""

import importlib.util

import pytest
import torch
from conftest import save_tiny_bert
from models import load
from test_architectures import saved  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

from lib.model.flops import training_flops

# PyTorch does not count its fused attention for CPUs.
COUNTED = "eager"


def counted(model):
    """Coefficients of T and T^2 in what a row of T tokens takes, from three lengths."""
    flops = {}
    for length in (8, 16, 32):
        ids = torch.full((1, length), 9)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
        flops[length] = counter.get_total_flops()
    low, high = (flops[16] - flops[8]) / 8, (flops[32] - flops[16]) / 16
    square = (high - low) / (48 - 24)
    return low - 24 * square, square


def test_by_hand(bert):
    # Each of two layers has 4 matrices of 32 x 32 and 2 of 32 x 64: 8,192 weights. The last one
    # applies two of 32 x 32 to all tokens, and attends from one of them.
    assert training_flops(load(bert)) == (6 * (8192 + 2048) + 12 * 32, 12 * 32)


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    # The projection of the embeddings, which the last two have, is left out.
    [("bert", 1e-6), ("distilbert", 1e-6), ("albert", 0.04), ("electra", 0.05)],
)
def test_equals_what_pytorch_counts(saved, kind, tolerance):  # noqa: F811
    model = load(saved / kind, attn_implementation=COUNTED)
    assert training_flops(model) == pytest.approx(counted(model), rel=tolerance)


def test_what_is_frozen_takes_less(tmp_path):
    """PyTorch also leaves out the gradient of the input of the lowest trained layer."""
    folder = save_tiny_bert(tmp_path, dropout=0.0, num_layers=4)
    model = load(folder, freeze_layers=2, attn_implementation=COUNTED)
    assert training_flops(model) == pytest.approx(counted(model), rel=0.1)
    assert training_flops(model).linear == (2 + 2 + 6) * 8192 + 6 * 2048 + 12 * 32


def test_adapters_spare_the_gradients_of_the_weights(tmp_path):
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    folder = save_tiny_bert(tmp_path, dropout=0.0, num_layers=4)
    model = load(folder, lora_rank=2, attn_implementation=COUNTED)
    assert training_flops(model) == pytest.approx(counted(model), rel=0.1)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_not_known_for_an_encoder_with_a_decoder(saved, kind):  # noqa: F811
    assert training_flops(load(saved / kind)) is None
