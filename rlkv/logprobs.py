"""Log-probabilities of chosen tokens without ever holding the logits of a whole batch."""

from __future__ import annotations

from typing import Any

import torch

from rlkv.attention import Mixed
from rlkv.attention.fused import takes
from rlkv.errors import RLKVError
from rlkv.family import FamilyForward, use_kernels
from rlkv.support import check_model

ROUND = 128  # tokens
LOGIT_BYTES = 512 * 2**20  # of float32 logits at a time


class _ChosenLogProb(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[token] of each row, a block of rows at a time.

    The gradient to ``hidden`` of one row is known up to a factor while its logits are at hand: (weight[token]
    - softmax @ weight) / temperature. So it is made then, [rows, width], and no logits are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        block = max(1, LOGIT_BYTES // (4 * weight.shape[0]))
        result = hidden.new_empty(len(tokens), dtype=torch.float32)
        slopes = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, len(tokens), block):
            rows = slice(start, start + block)
            logits = torch.nn.functional.linear(hidden[rows], weight)
            result[rows], slope = chosen_softmax(logits, tokens[rows], temperature, slopes is not None)
            if slopes is not None:
                slopes[rows] = slope @ weight / temperature
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (slopes,) = ctx.saved_tensors
        return (grads[0][:, None] * slopes.float()).to(slopes.dtype), None, None, None


def chosen_softmax(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [n]: log softmax(logits / temperature)[token]; with ``keep`` its slope in the scaled logits.

    The slope [n, V] is one-hot(token) - softmax, rounded after the difference: of a token that is nearly
    certain, 16 bits keep no 1 - p otherwise. The memory of ``logits`` [n, V] is used up.
    """
    if use_kernels(logits.device):
        from rlkv.kernels.vocabulary import chosen_softmax_

        return chosen_softmax_(logits, tokens, temperature, keep), logits
    wide = torch.log_softmax(logits.float() / temperature, dim=-1)
    chosen = wide.gather(1, tokens[:, None])[:, 0]
    if not keep:
        return chosen, logits
    slope = wide.exp_().neg_()
    slope[torch.arange(len(tokens), device=tokens.device), tokens] += 1
    return chosen, slope.to(logits.dtype)


def chosen_logprobs(
    hidden: torch.Tensor, head: torch.nn.Module, tokens: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """float32 [n]: log-probability of ``tokens`` [n] given final hidden states [n, width].

    ``head`` is the model's output embedding (a linear layer without bias); its weights get no gradient.
    """
    return _ChosenLogProb.apply(hidden, head.weight, tokens, temperature)


@torch.no_grad()
def check_head(model: Any) -> None:
    """Raise RLKVError unless logits are the output embedding of the final hidden states and nothing more.

    A bias, a scale or a cap after it (Phi, Granite, Cohere) would be missing from :func:`chosen_logprobs`.
    """
    ids = torch.arange(4, device=model.device)[None]
    head, hidden = model.get_output_embeddings(), model.base_model(ids, use_cache=False).last_hidden_state
    plain = torch.nn.functional.linear(hidden, head.weight)
    if not torch.allclose(plain, model(ids, use_cache=False).logits, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise RLKVError(
            f"{model.config.model_type}: its logits are not a plain output embedding: there is a bias, a "
            "scale or a cap, which the trainer's log-probabilities would miss"
        )


def on_kernels(model: Any) -> bool:
    """Whether :func:`final_hidden` can leave the model's own forward, which keeps far more for autograd."""
    return FamilyForward.fits(model) and takes(model.dtype, model.device, check_model(model).head_dim)


def final_hidden(model: Any, ids: torch.Tensor, mixed: Mixed) -> torch.Tensor:
    """[rows, tokens, width] after the final norm, of rows ``ids`` that each are one sequence.

    On the kernels where model and device allow it, else by the model's own forward.
    """
    whole = mixed.cu_seqlens is None and mixed.path in ("auto", "kernel")
    if not (whole and on_kernels(model)):
        return model.base_model(ids, use_cache=False, rlkv=mixed).last_hidden_state
    from rlkv.kernels.mixed import mixed_attention

    shape, (rows, length) = check_model(model), ids.shape
    mixed.check_gates(rows, shape.layers, shape.kv_heads)

    def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        gates, closed = mixed.layer(layer), mixed.closed(layer)
        scaling = query.shape[-1] ** -0.5
        return mixed_attention(
            query, key, value, gates, [length] * rows, mixed.window, scaling, closed=closed
        )

    positions = torch.arange(length, device=ids.device).repeat(rows)
    return FamilyForward(model)(ids.flatten(), positions, attend).view(rows, length, -1)


def padded(width: int) -> int:
    """Tokens of a row on CUDA: few shapes, since cuDNN plans each one for a tenth of a second."""
    return -(-width // ROUND) * ROUND


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``values`` there, without waiting for the work that the device still has."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def response_logprobs(
    model: Any, rows: list[tuple[list[int], list[int]]], temperature: float, rlkv: Mixed
) -> torch.Tensor:
    """float32 [all response tokens, row after row] for rows of (prompt tokens, response tokens).

    Rows are padded on the right, which causal attention never sees, so no mask is needed.
    """
    width = max(len(prompt) + len(response) for prompt, response in rows)
    if model.device.type == "cuda":
        width = padded(width)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    where: list[int] = []
    at: list[int] = []
    for index, (prompt, response) in enumerate(rows):
        ids[index, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        at += range(len(prompt) - 1, len(prompt) + len(response) - 1)
        where += [index] * len(response)
    tensors = (ids, torch.tensor(where), torch.tensor(at))
    ids, row, column = (to_device(tensor, model.device) for tensor in tensors)
    hidden = final_hidden(model, ids, rlkv)[row, column]
    return chosen_logprobs(hidden, model.get_output_embeddings(), ids[row, column + 1], temperature)
