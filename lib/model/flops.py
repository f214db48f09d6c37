"""The floating-point operations of training, from a model's weights and its rows' lengths."""

from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from lib.model.layers import encoder_layers, is_shortened, weights_of_all_tokens


class RowFlops(NamedTuple):
    """FLOPs of a forward and backward pass over a row of T tokens: `linear` T + `square` T^2."""

    linear: float
    square: float


def training_flops(model: nn.Module) -> RowFlops | None:
    """Return what the encoder's layers take; None if the model is not a stack of equal layers.

    6N for each token, of N weights in matrices: 2N in the forward pass, 2N for the gradient of the
    activations, 2N for that of the weights; and 12 L d T for the attention of L layers of width d
    over T tokens. A frozen weight has no gradient, and below the lowest one that is trained there
    is no backward pass. Embeddings, biases, normalization, and what sees one token of a row, as the
    classifier, are left out. Attention counts as full; recomputed activations do not count.

    Source: Kaplan et al. (2020), section 2.1; Chowdhery et al. (2022, PaLM), appendix B.
    """
    stacked = any(isinstance(part, nn.ModuleList) for part in model.modules())
    if not isinstance(model, PreTrainedModel) or not stacked:
        return None
    names = ("hidden_size", "num_hidden_layers", "is_encoder_decoder")
    width, depth, has_decoder = (getattr(model.config, name, 0) for name in names)
    if not (width and depth) or has_decoder:
        return None
    layers = encoder_layers(model)
    repeats, rest = divmod(depth, len(layers))  # ALBERT runs the same layer again and again
    if rest:
        return None
    embeddings = model.get_input_embeddings()
    backward = any(weight.requires_grad for weight in embeddings.parameters())
    linear = square = 0
    for layer in layers:
        matrices = [weight for weight in weights_of_all_tokens(layer) if weight.ndim > 1]
        trained = sum(weight.numel() for weight in matrices if weight.requires_grad)
        backward = backward or any(weight.requires_grad for weight in layer.parameters())
        linear += (4 if backward else 2) * sum(weight.numel() for weight in matrices) + 2 * trained
        attention = (12 if backward else 4) * width
        if is_shortened(layer):
            linear += attention  # of one token to all
        else:
            square += attention
    return RowFlops(linear * repeats, square * repeats)
