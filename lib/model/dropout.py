"""Dropout for CPUs that takes a quarter of the random numbers.

PyTorch draws a number for each element of a mask, and one after the other except on Intel's CPUs.
Here 16 bits decide an element, so that a 64-bit number serves four.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lib.backends import devices

# Values of the 16 bits that decide an element: probabilities are rounded to 1 in so many.
NUM_VALUES = 2**16


class FewerDraws(nn.Dropout):
    """`nn.Dropout`, with `dropped`."""

    def forward(self, input: Tensor) -> Tensor:
        return dropped(input, self.p) if self.training and self.p else input


def configure(accelerator: Accelerator, model: nn.Module) -> None:
    """Give a model this dropout if it runs on CPUs that draw one number after the other.

    Its layers get it, and the attention (SDPA) of all models of the process. A compiled model keeps
    PyTorch's dropout, which is compiled with the rest.
    """
    compiled = devices.compiles_shapes(accelerator)
    if accelerator.device.type != "cpu" or compiled or devices.draws_in_parallel():
        return
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = FewerDraws
    AttentionInterface.register("sdpa", attention)


def dropped(inputs: Tensor, probability: float) -> Tensor:
    """Zero each element with this probability, and scale the others to keep the mean."""
    num_zeroed, count = round(probability * NUM_VALUES), inputs.numel()
    if num_zeroed == NUM_VALUES:
        return inputs * 0
    numbers = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = numbers.view(torch.int16)[:count].view(inputs.shape)
    kept = (bits >= num_zeroed - NUM_VALUES // 2).to(inputs.dtype)
    return inputs * kept.mul_(NUM_VALUES / (NUM_VALUES - num_zeroed))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' "eager" attention does, but with `dropped`; without dropout, as SDPA.

    With dropout, SDPA has no fused kernel on CPUs, and multiplies bf16 in fp32.

    Args:
        query, key, value: of shape (batch, heads, tokens, head size).
        attention_mask: true where a token is seen, (batch, 1, tokens, tokens) or to be broadcast.
    """
    if not dropout or not _is_plain(module, query, key, attention_mask, options):
        options |= {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scale) @ key.transpose(2, 3)
    if attention_mask is not None:
        scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
    weights = dropped(scores.softmax(dim=-1), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _is_plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> bool:
    """True where `attention` computes what SDPA does: no grouped heads, bias, cap or added mask."""
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if attention_mask is None:
        causal = options.get("is_causal")
        seen = not (getattr(module, "is_causal", True) if causal is None else causal)
    else:
        seen = attention_mask.dtype == torch.bool
    special = any(options.get(name) is not None for name in ("position_bias", "softcap"))
    return seen and not special and key.shape[1] == query.shape[1]
