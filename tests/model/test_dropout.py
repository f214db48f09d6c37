"""Dropout for CPUs: each element is dropped alike, with a quarter of the random numbers."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate.utils import DynamoBackend
from conftest import save_tiny_bert
from models import load
from runs import run
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lib.backends import devices
from lib.model import dropout


def accelerator(device="cpu", backend=DynamoBackend.NO):
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=backend))
    return SimpleNamespace(device=torch.device(device), state=state, distributed_type="NO")


@pytest.fixture(autouse=True)
def _as_on_amd(monkeypatch):
    monkeypatch.setattr(devices, "draws_in_parallel", lambda: False)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_elements_are_dropped_one_by_one(dtype, probability):
    torch.manual_seed(0)
    count = 4 * 2**18
    result = dropout.dropped(torch.ones(count, dtype=dtype), probability)
    zero, scale = result.unique().tolist()  # in bf16 rounded to 8 bits, as PyTorch's
    rounding = 1e-5 if dtype == torch.float32 else 2**-9
    assert (zero, scale) == (0, pytest.approx(1 / (1 - probability), rel=rounding))
    zeroed = (result == 0).double().view(-1, 4)
    deviation = (probability * (1 - probability)) ** 0.5
    # Each of the four elements that share a number: five standard errors of a frequency.
    assert (zeroed.mean(0) - probability).abs().max() < 5 * deviation / len(zeroed) ** 0.5
    # No two of them, nor neighbors of two numbers, are related.
    together = torch.corrcoef(torch.cat([zeroed[:-1], zeroed[1:]], dim=1).T)
    assert (together - torch.eye(8)).abs().max() < 5 / (len(zeroed) - 1) ** 0.5


def test_the_gradient_is_dropped_with_the_element():
    torch.manual_seed(0)
    inputs = torch.randn(
        3, 5, 7, requires_grad=True
    )  # an odd count: the last number is not used up
    result = dropout.dropped(inputs, 0.25)
    result.sum().backward()
    assert set(inputs.grad.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert torch.equal(result, inputs.detach() * inputs.grad)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_nothing_and_everything_are_pytorchs(probability):
    layer = dropout.FewerDraws(probability)
    assert torch.equal(layer(torch.ones(9)), torch.full((9,), 1 - probability))
    assert torch.equal(layer.eval()(torch.ones(9)), torch.ones(9))


def masked(shown):
    """A mask of shape (1, 1, 6, 6) from a rule of the query's and the key's position."""
    query, key = torch.arange(6).view(6, 1), torch.arange(6).view(1, 6)
    return shown(query, key).expand(1, 1, 6, 6)


@pytest.mark.parametrize(
    "mask",
    [None, masked(lambda query, key: key < 4), masked(lambda query, key: key <= query)],
    ids=["whole", "padded", "causal"],
)
def test_attention_is_that_of_pytorch(mask, monkeypatch):
    """With a probability that is rounded to 0, and so drops nothing."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 6, 8)
    options = {"attention_mask": mask, "scaling": 0.3}
    module = SimpleNamespace(is_causal=False)
    torchs, _ = sdpa_attention_forward(module, query, key, value, dropout=0.0, **options)
    monkeypatch.delattr(dropout, "sdpa_attention_forward")
    ours, _ = dropout.attention(module, query, key, value, dropout=1e-6, **options)
    assert torch.allclose(ours, torchs, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ({}, {"attention_mask": torch.zeros(1, 1, 6, 6)}),  # to be added
        ({}, {"position_bias": torch.randn(1, 4, 6, 6)}),
        ({}, {"is_causal": True}),
        ({"is_causal": True}, {}),
        ({"num_key_value_groups": 2}, {}),
    ],
    ids=["added mask", "bias", "asked to be causal", "causal", "grouped heads"],
)
def test_other_attention_is_left_to_pytorch(module, options):
    query, key, value = torch.randn(3, 2, 4, 6, 8)
    module = SimpleNamespace(**{"is_causal": False, **module})
    if hasattr(module, "num_key_value_groups"):
        key, value = key[:, :2], value[:, :2]
    results = []
    for attend in (dropout.attention, sdpa_attention_forward):
        torch.manual_seed(0)
        given = {"attention_mask": None, "dropout": 0.5, **options}
        results.append(attend(module, query, key, value, **given)[0])
    assert torch.equal(*results)


def test_a_cap_is_refused_as_by_pytorch():
    tensors = torch.randn(3, 2, 4, 6, 8)
    with pytest.raises(ValueError, match="softcap"):
        dropout.attention(SimpleNamespace(), *tensors, None, dropout=0.5, softcap=30.0)


def test_attention_that_drops_everything_is_zero():
    attended, _ = dropout.attention(
        SimpleNamespace(is_causal=False), *torch.randn(3, 2, 4, 6, 8), None, dropout=1.0
    )
    assert torch.equal(attended, torch.zeros(2, 6, 4, 8))


def test_the_script_trains_with_it(flags, dropout_bert, tmp_path, monkeypatch):
    """A micro-batch: two layers with three dropouts each, the embeddings and the classifier."""
    count = mock.Mock(side_effect=dropout.dropped)
    monkeypatch.setattr(dropout, "dropped", count)
    run(flags, tmp_path, f"--model_name_or_path={dropout_bert}", "--max_train_steps=3")
    assert count.call_count == 3 * (2 * 3 + 2)


def test_an_update_on_a_cpu_draws_no_other_numbers(tmp_path):
    """Two layers with three dropouts each, that of the embeddings and that of the classifier."""
    model = load(save_tiny_bert(tmp_path, dropout=0.1))
    dropout.configure(accelerator(), model)
    batch = {"input_ids": torch.full((4, 8), 9), "attention_mask": torch.ones(4, 8).long()}
    batch["attention_mask"][0, 5:] = 0
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model.train()(**batch).logits.sum().backward()
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["aten::random_"] == 2 * 3 + 2
    assert not {"aten::bernoulli_", "aten::dropout", "aten::native_dropout"} & counts.keys()


@pytest.mark.parametrize("elsewhere", ["accelerator", "compiled", "Intel"])
def test_elsewhere_the_model_keeps_its_own(tmp_path, elsewhere, monkeypatch):
    model = load(save_tiny_bert(tmp_path, dropout=0.1))
    device = "meta" if elsewhere == "accelerator" else "cpu"
    backend = DynamoBackend.INDUCTOR if elsewhere == "compiled" else DynamoBackend.NO
    monkeypatch.setattr(devices, "draws_in_parallel", lambda: elsewhere == "Intel")
    dropout.configure(accelerator(device, backend), model)
    assert not any(isinstance(module, dropout.FewerDraws) for module in model.modules())
    assert AttentionInterface._global_mapping["sdpa"] is sdpa_attention_forward


def test_a_later_model_of_the_process_that_is_compiled_keeps_its_own(tmp_path):
    dropout.configure(accelerator(), load(save_tiny_bert(tmp_path, dropout=0.1)))
    model = torch.compile(load(save_tiny_bert(tmp_path / "2", dropout=0.1)), backend="eager")
    batch = {"input_ids": torch.full((4, 8), 9), "attention_mask": torch.ones(4, 8).long()}
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model.train()(**batch)
    assert "aten::random_" not in {event.key for event in profiler.key_averages()}
