"""The benchmark of matrix products, at toy size and in this process."""

import json

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks import matmul


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("flags", [[], ["--torch_dropout", "--whole_last_layer"]])
def test_counts_the_products_of_an_update(tmp_path, capsys, monkeypatch, flags):
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)
    sizes = ["--hidden=32", "--tokens=64", "--threads=1", "--layers=1", "--repeats=1"]
    matmul.main([*sizes, *flags, f"--plot={tmp_path / 'time.png'}"])
    *_, line = capsys.readouterr().out.splitlines()
    updates = json.loads(line)
    assert [update["precision"] for update in updates] == ["fp32", "bf16"]
    # Forward and two gradients, 2 operations each: 12 x 32 x 32 weights on 16 x 64 tokens, or only
    # keys and values and the others on 16; those of the pooler and the classifier on 16; queries
    # with keys and scores with values.
    tokens, queries = (16 * 64, 64) if flags else (16, 1)
    linear = (2 * 16 * 64 + 10 * tokens) * 32 * 32 + (32 * 32 + 32 * 2) * 16
    attention = 2 * 16 * queries * 64 * 32
    for update in updates:
        assert update["flops"] == 3 * 2 * (linear + attention)
        assert sum(update["groups"].values()) == pytest.approx(update["seconds"])
        assert update["groups"]["matrix products"] > 0 < update["groups"]["random numbers"]
    assert (tmp_path / "time.png").stat().st_size > 0


def test_operators_are_in_the_group_of_what_they_are_the_gradient_of():
    groups = {
        "aten::addmm": "matrix products",
        "aten::add_": "sums and products by element",
        "aten::mm": "matrix products",
        "aten::mul": "sums and products by element",
        "aten::_softmax_backward_data": "GELU, softmax, layer norm",
        "aten::embedding_dense_backward": "embeddings",
        "aten::linalg_vector_norm": "AdamW and clipping",
        "aten::view": matmul.REST,
    }
    assert {operator: matmul.group_of(operator) for operator in groups} == groups
