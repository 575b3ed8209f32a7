"""Log-probabilities of chosen tokens without ever holding the logits of a whole batch."""

from __future__ import annotations

from typing import Any

import torch

from rlkv.errors import RLKVError

ROUND = 256  # rows of a batch on CUDA are padded to a multiple of so many tokens
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
            logits = torch.nn.functional.linear(hidden[rows], weight).float() / temperature
            logits = torch.log_softmax(logits, dim=-1)
            result[rows] = logits.gather(1, tokens[rows, None])[:, 0]
            if slopes is not None:
                expected = logits.exp_().to(weight.dtype) @ weight
                slopes[rows] = (weight[tokens[rows]] - expected) / temperature
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (slopes,) = ctx.saved_tensors
        return (grads[0][:, None] * slopes.float()).to(slopes.dtype), None, None, None


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


def response_logprobs(
    model: Any, rows: list[tuple[list[int], list[int]]], temperature: float, **forward: Any
) -> torch.Tensor:
    """float32 [all response tokens, row after row] for rows of (prompt tokens, response tokens).

    Rows are padded on the right, which causal attention never sees, so no mask is needed. ``forward`` goes to
    the model (``rlkv=Mixed(...)``).
    """
    width = max(len(prompt) + len(response) for prompt, response in rows)
    if model.device.type == "cuda":  # few shapes: cuDNN plans each one for a tenth of a second
        width = -(-width // ROUND) * ROUND
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    where: list[int] = []
    at: list[int] = []
    for index, (prompt, response) in enumerate(rows):
        ids[index, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        at += range(len(prompt) - 1, len(prompt) + len(response) - 1)
        where += [index] * len(response)
    device = model.device
    ids, row, column = ids.to(device), torch.tensor(where, device=device), torch.tensor(at, device=device)
    hidden = model.base_model(ids, use_cache=False, **forward).last_hidden_state[row, column]
    return chosen_logprobs(hidden, model.get_output_embeddings(), ids[row, column + 1], temperature)
