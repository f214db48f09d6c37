"""The encoder's layers: found, reinitialized, frozen, and the last one shortened."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.bert.modeling_bert import BertCrossAttention

from lib.errors import InputError

# A row for what needs a forward pass.
PROBE = "one two"
# transformers' classifiers of BERT's layers that read the last layer at the first token alone.
READ_FIRST_TOKEN = {
    f"{name}ForSequenceClassification"
    for name in ("Bert", "Camembert", "Electra", "Roberta", "XLMRoberta")
}


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the encoder's layers from the bottom to the top: the longest list of modules.

    Raises:
        InputError: the model has no list of modules.
    """
    lists = [part for part in model.base_model.modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no stack of layers to tell apart: use "
            "--reinit_layers 0 and, with FSDP, fsdp_auto_wrap_policy: NO_WRAP"
        )
    return max(lists, key=len)


def reinitialize(model: PreTrainedModel, num_layers: int) -> None:
    """Give the top `num_layers` encoder layers, and the pooler, new random weights.

    Source: Zhang et al. (2021), Revisiting Few-sample BERT Fine-tuning, section 5.
    """
    if num_layers == 0:
        return
    layers = encoder_layers(model)
    if num_layers > len(layers):
        raise InputError(
            f"--reinit_layers {num_layers} is more than the model's {len(layers)} encoder layers"
        )
    modules = [*layers[-num_layers:], getattr(model.base_model, "pooler", None)]
    for module in modules:
        for part in module.modules() if module is not None else ():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=model.config.initializer_range)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
            elif isinstance(part, nn.LayerNorm):
                nn.init.ones_(part.weight)
                nn.init.zeros_(part.bias)


def freeze_lowest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_layers: int,
    num_reinitialized: int,
) -> None:
    """Freeze the lowest `num_layers` encoder layers, and all that their input comes from.

    Found in the graph of one row: whatever the embeddings of an architecture consist of.
    """
    layers = encoder_layers(model)
    if num_layers + num_reinitialized > len(layers):
        new = f" and --reinit_layers {num_reinitialized}" if num_reinitialized else ""
        raise InputError(
            f"--freeze_layers {num_layers}{new}: the model has {len(layers)} encoder layers"
        )
    outputs: list[Any] = []
    if num_layers > 0:
        hook = layers[num_layers - 1].register_forward_hook(
            lambda _, inputs, output: outputs.append(output)
        )
    else:
        hook = layers[0].register_forward_pre_hook(
            lambda _, inputs, named: outputs.append(inputs or named["hidden_states"]),
            with_kwargs=True,
        )
    model(**tokenizer(PROBE, return_tensors="pt"))
    hook.remove()
    hidden = outputs[0] if isinstance(outputs[0], Tensor) else outputs[0][0]
    lower = _weights_behind(hidden)
    for weight in model.parameters():
        if id(weight) in lower:
            weight.requires_grad_(False)


def freeze_unused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Freeze the weights that no row reaches, such as XLNet's `mask_emb`.

    DDP waits for a gradient of every weight that is not frozen. Its `find_unused_parameters`
    searches the graph of each update; here that of one row is searched, in evaluation mode, once.
    An expert that this row is not sent to stays: where some modules of a list are used, all are.
    """
    used = _weights_behind(model(**tokenizer(PROBE, return_tensors="pt")).logits)
    for modules in model.modules():
        if isinstance(modules, nn.ModuleList | nn.ModuleDict):
            weights = [{id(weight) for weight in part.parameters()} for part in modules.children()]
            unused = [part for part in weights if not part & used]
            if len(unused) < len(weights):
                used = used.union(*unused)
    for weight in model.parameters():
        if id(weight) not in used:
            weight.requires_grad_(False)


class FirstTokenQuery(nn.Module):
    """Put before BertSelfAttention: only the first token attends."""

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> tuple[Tensor, ...]:
        seen = None if attention_mask is None else attention_mask[:, :, :1]
        return BertCrossAttention.forward(self, hidden_states[:, :1], hidden_states, seen)


class FirstTokenResidual(nn.Module):
    """Put before BertSelfOutput: what attention found is added to the first token alone."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return super().forward(hidden_states, input_tensor[:, :1])


def shorten_last(model: PreTrainedModel) -> None:
    """Compute the last layer for the first token alone, where the classifier reads no other.

    Only keys and values are needed of all. The logits and gradients stay, but for rounding and the
    masks of dropout; `output_hidden_states` and `output_attentions` lack the other tokens.
    """
    known = type(model).__name__ in READ_FIRST_TOKEN and not model.config.is_decoder
    own = type(model).forward.__module__.startswith("transformers.models.")
    # Other attentions have masks of other shapes.
    if known and own and model.config._attn_implementation in ("eager", "sdpa"):
        last: Any = encoder_layers(model)[-1]
        last.chunk_size_feed_forward = 0  # one token is no chunk
        _put_before(last.attention.self, FirstTokenQuery)
        _put_before(last.attention.output, FirstTokenResidual)


def _put_before(module: nn.Module, base: type[nn.Module]) -> None:
    """Let a module inherit from `base` first. It keeps its name, by which FSDP finds it."""
    module.__class__ = type(type(module).__name__, (base, type(module)), {})


def weights_of_all_tokens(layer: Any) -> list[nn.Parameter]:
    """Return the layer's weights, without those that a shortened layer applies to one token."""
    if not is_shortened(layer):
        return list(layer.parameters())
    attention = layer.attention.self
    return [*attention.key.parameters(), *attention.value.parameters()]


def is_shortened(layer: Any) -> bool:
    """Tell whether `shorten_last` changed this layer."""
    return isinstance(getattr(getattr(layer, "attention", None), "self", None), FirstTokenQuery)


def _weights_behind(output: Tensor) -> set[int]:
    """Return the `id` of each weight that a gradient of `output` would reach."""
    found, seen, nodes = set(), set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))  # only the graph's leaves have one
            nodes += [following for following, _ in node.next_functions]
    return found
