import pytest
import torch
from models import load
from torch.nn.functional import cross_entropy, mse_loss

from lib.data.tasks import IGNORED
from lib.training.optimization import (
    learning_rate_at,
    learning_rate_schedule,
    loss_sum,
    parameter_groups,
    set_learning_rate,
)


def test_loss_is_the_sum_over_rows():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, IGNORED])
    expected = cross_entropy(logits[:5], labels[:5]) * 5
    assert loss_sum(logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)
    smoothed = cross_entropy(logits[:5], labels[:5], label_smoothing=0.1) * 5
    assert loss_sum(logits, labels, 0.1).item() == pytest.approx(smoothed.item(), rel=1e-6)


def test_loss_of_scores_is_the_sum_of_squares():
    logits, labels = torch.randn(4, 1), torch.tensor([1.0, 2.0, 0.5, IGNORED])
    expected = mse_loss(logits[:3, 0], labels[:3]) * 3
    assert loss_sum(logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)


def test_only_ignored_rows_have_neither_loss_nor_gradient():
    logits = torch.randn(2, 2, requires_grad=True)
    loss_sum(logits, torch.tensor([IGNORED, IGNORED])).backward()
    assert logits.grad.abs().sum() == 0


def test_biases_and_normalization_do_not_decay(bert):
    model = load(bert)
    groups = parameter_groups(model, 0.1)
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        plain = name.endswith("bias") or "LayerNorm" in name
        assert decay_of[id(parameter)] == (0.0 if plain else 0.1), name


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial"])
def test_learning_rate_rises_and_ends_at_0(kind):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1.0)
    schedule = learning_rate_schedule(optimizer, kind, 4, 20)
    rates = [learning_rate_at(schedule, update) for update in range(21)]
    assert rates[:5] == [0, 0.25, 0.5, 0.75, 1]
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[20] == pytest.approx(0, abs=1e-6)


def test_a_schedule_resumes_at_any_update():
    rates = []
    for start in (0, 7):
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.AdamW([weight], lr=1.0)
        schedule = learning_rate_schedule(optimizer, "cosine", 4, 20)
        set_learning_rate(schedule, start)
        rates_from_start = []
        for _ in range(start, 20):
            rates_from_start.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        rates.append(rates_from_start)
    assert rates[1] == rates[0][7:]
