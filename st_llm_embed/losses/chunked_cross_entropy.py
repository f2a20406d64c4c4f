"""Cross-entropy over a vocabulary without the logits of all tokens at once.

In: states ``(tokens, dim)``, weight ``(vocabulary, dim)``, bias ``(vocabulary,)`` or None, targets ``(tokens,)``, and
perhaps a softcap.
Out: the sum over tokens, a scalar, in float32 or wider.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128  # positions whose vocabulary logits exist at once


class ChunkedCrossEntropy(torch.autograd.Function):
    """``cross_entropy(states @ weight.T + bias, targets, reduction="sum")`` without ``(tokens, vocabulary)`` logits.

    Those of a chunk of tokens are made, turned into loss and gradients at once, and dropped, so that none is kept for
    the backward pass and the gradient of ``weight`` exists once. With a softcap c, as Gemma 2 has one, each logit x is
    c tanh(x / c).
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None = None,
    ) -> Tensor:
        wide = torch.promote_types(states.dtype, torch.float32)
        gradients = [
            torch.zeros_like(tensor, dtype=wide) if tensor is not None and tensor.requires_grad else None
            for tensor in (states, weight, bias)
        ]
        of_states, of_weight, of_bias = gradients
        total = states.new_zeros((), dtype=wide)
        for start in range(0, len(states), CHUNK):
            chunk, target = states[start : start + CHUNK], targets[start : start + CHUNK].unsqueeze(1)
            logits = F.linear(chunk, weight, bias).to(wide)  # (chunk, vocabulary)
            slope = None
            if softcap is not None:
                bent = torch.tanh(logits / softcap)
                logits, slope = softcap * bent, 1 - bent**2
            log_probabilities = logits.log_softmax(dim=-1)
            del logits
            total -= log_probabilities.gather(1, target).sum()
            if of_states is None and of_weight is None and of_bias is None:
                continue
            error = log_probabilities.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=wide))
            if slope is not None:
                error *= slope
            if of_states is not None:
                of_states[start : start + CHUNK] = error.to(weight.dtype) @ weight
            if of_weight is not None:
                of_weight.addmm_(error.T, chunk.to(wide))
            if of_bias is not None:
                of_bias += error.sum(dim=0)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype if tensor is not None else None for tensor in (states, weight, bias)]
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if kept is None else (kept * gradient).to(dtype)
            for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)
