"""Train with a change that the script does not have, to learn whether it should.

    python -m benchmarks.recipe_variants swap_pairs --output_dir DIR ...

The script runs as it is, with one function of `lib/` replaced; its flags follow the variant's name.
A change that is shown to help belongs in the script, one that is not stays here, where the table of
docs/recipe.md can be made again.
"""

import argparse
import contextlib
import dataclasses
import functools
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import concatenate_datasets
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

SCRIPT = Path(__file__).parent.parent / "train_mrpc.py"


@contextlib.contextmanager
def swap_pairs() -> Iterator[None]:
    """Swap the two texts of half of the training rows: others in each epoch."""
    from lib.data import batching
    from lib.data.splits import Splits

    map_splits, plan_epoch = Splits.map, batching.plan_epoch

    def map_in_both_orders(
        splits: Splits, encode: functools.partial[Any], *, cache_key: str, **options: Any
    ) -> Splits:
        columns = encode.keywords["columns"][::-1]
        swapped = map_splits(
            splits,
            functools.partial(encode, columns=columns),
            cache_key=f"{cache_key} swapped",
            **options,
        )
        mapped = map_splits(splits, encode, cache_key=cache_key, **options)
        train = concatenate_datasets([mapped.train, swapped.train])
        return dataclasses.replace(mapped, train=train)

    def plan_with_swaps(lengths: Any, epoch: int, *, seed: int, **options: Any) -> batching.Plan:
        num_rows = len(lengths) // 2  # the second half are the same rows, swapped
        plan = plan_epoch(lengths[:num_rows], epoch, seed=seed, **options)
        swapped = np.random.default_rng([seed, epoch, 1]).random(num_rows) < 0.5
        return dataclasses.replace(plan, order=plan.order + num_rows * swapped[plan.order])

    with (
        mock.patch.object(Splits, "map", map_in_both_orders),
        mock.patch.object(batching, "plan_epoch", plan_with_swaps),
    ):
        yield


# The learning rate of a layer relative to the layer above.
LAYERWISE_DECAY = 0.9


@contextlib.contextmanager
def layerwise_decay() -> Iterator[None]:
    """Train each layer at a lower learning rate than the layer above; the embeddings at the least.

    Source: Howard and Ruder (2018), section 3.2, who divide by 2.6 from layer to layer.
    """
    from lib.model.layers import encoder_layers
    from lib.training import optimization

    parameter_groups = optimization.parameter_groups
    learning_rate_schedule = optimization.learning_rate_schedule

    def groups_by_depth(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
        layers = encoder_layers(model)
        depths = dict.fromkeys(model.base_model.parameters(), len(layers) + 1)
        for number, layer in enumerate(layers):
            depths |= dict.fromkeys(layer.parameters(), len(layers) - number)
        depths |= dict.fromkeys(model.base_model.pooler.parameters(), 0)
        return [
            {**group, "params": [weight], "depth": depths.get(weight, 0)}
            for group in parameter_groups(model, weight_decay)
            for weight in group["params"]
        ]

    def schedule_by_depth(optimizer: torch.optim.Optimizer, *arguments: Any) -> LambdaLR:
        for group in optimizer.param_groups:
            group["lr"] *= LAYERWISE_DECAY ** group["depth"]
        return learning_rate_schedule(optimizer, *arguments)

    with (
        mock.patch.object(optimization, "parameter_groups", groups_by_depth),
        mock.patch.object(optimization, "learning_rate_schedule", schedule_by_depth),
    ):
        yield


# The weight of the divergence beside the mean of two cross-entropies; 2 beside their sum, as in the
# paper's equation.
R_DROP_ALPHA = 1.0


@contextlib.contextmanager
def r_drop() -> Iterator[None]:
    """Pass each row twice, and add the symmetric divergence of the two outputs to the loss.

    Source: Liang et al. (2021), R-Drop, NeurIPS 34.
    """
    from lib.model import loading
    from lib.training.optimization import Criterion

    load_model, sum_of_losses = loading.load_model, Criterion.sum

    def load_doubling_model(*arguments: Any, **options: Any) -> nn.Module:
        model: nn.Module = load_model(*arguments, **options)
        forward = model.forward

        def forward_twice(self: nn.Module, **batch: Tensor) -> Any:
            if self.training:
                batch = {name: torch.cat([value, value]) for name, value in batch.items()}
            return forward(**batch)

        model.forward = MethodType(forward_twice, model)
        return model

    def sum_with_divergence(criterion: Criterion, logits: Tensor, labels: Tensor) -> Tensor:
        passes = logits.float().chunk(2)
        loss = sum(sum_of_losses(criterion, one, labels) for one in passes) / 2
        first, second = (one.log_softmax(-1) for one in passes)
        divergence = functools.partial(nn.functional.kl_div, reduction="sum", log_target=True)
        return loss + R_DROP_ALPHA * (divergence(first, second) + divergence(second, first)) / 2

    with (
        mock.patch.object(loading, "load_model", load_doubling_model),
        mock.patch.object(Criterion, "sum", sum_with_divergence),
    ):
        yield


@contextlib.contextmanager
def mean_pooling() -> Iterator[None]:
    """Give the pooler the mean over all tokens instead of the first one.

    A model trained so is not what `from_pretrained` makes of its folder without this change.
    """
    from transformers import BertForSequenceClassification
    from transformers.modeling_outputs import SequenceClassifierOutput

    def forward(
        self: BertForSequenceClassification, attention_mask: Tensor, **inputs: Tensor
    ) -> SequenceClassifierOutput:
        outputs = self.bert(attention_mask=attention_mask, **inputs)
        weights = attention_mask.unsqueeze(-1).to(outputs.last_hidden_state.dtype)
        mean = (outputs.last_hidden_state * weights).sum(1) / weights.sum(1)
        pooled = self.bert.pooler(mean.unsqueeze(1))  # which takes the first of one
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(pooled)))

    with mock.patch.object(BertForSequenceClassification, "forward", forward):
        yield


VARIANTS = {
    change.__name__: change for change in (layerwise_decay, swap_pairs, r_drop, mean_pooling)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("variant", choices=list(VARIANTS))
    variant, sys.argv[1:] = sys.argv[1:2], sys.argv[2:]
    sys.argv[0] = str(SCRIPT)
    with VARIANTS[parser.parse_args(variant).variant]():
        runpy.run_path(str(SCRIPT), run_name="__main__")


if __name__ == "__main__":
    main()
