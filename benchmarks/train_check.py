"""Is the update that is about to be timed the right one? Log-probabilities and the gates' gradient.

The judge is transformers' forward with the reference attention, in 16 bits as well: a float32 copy of an 8B
model has no place beside it. Two right ways to compute in 16 bits differ by rounding, so ours must not be
further from the judge than 1.5 times PyTorch's fused attention is, on the same sequences. (The judge rounds
too: on the H100 they are .117 and .080 from it, where from float32 they are .061 and .059.) The gradient is
that of the mean log-probability; the policy loss has a cap that rounding crosses (docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_timing import relative_error, require

from rlkv.attention import Mixed
from rlkv.family import FamilyForward
from rlkv.logprobs import response_logprobs
from rlkv.window import Window

LENGTHS, PROMPT = (540, 400, 60), 100
WORSE = 1.5


@contextmanager
def transformers_forward() -> Iterator[None]:
    """Keep the trainer from its own forward."""
    fits = FamilyForward.fits
    FamilyForward.fits = staticmethod(lambda model: False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        FamilyForward.fits = staticmethod(fits)  # type: ignore[method-assign]


def check_update(model: Any, gates: torch.Tensor, window: Window) -> dict[str, float]:
    """Distances from the judge, ours and PyTorch's; raises RLKVError if ours are too large.

    Ours takes all sequences at once, padded, as the trainer does.
    """
    generator = torch.Generator().manual_seed(7)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 20000, (count,), generator=generator).tolist()

    rows = [(tokens(PROMPT), tokens(length)) for length in LENGTHS]
    batches = {"auto": [rows], "chunked": [[row] for row in rows], "reference": [[row] for row in rows]}
    if model.device.type == "cuda" and FamilyForward.fits(model):
        FamilyForward(model, join=True)  # as the learner will
    found: dict[str, list[torch.Tensor]] = {}
    for path, parts in batches.items():
        own = gates.to(model.device, torch.float32).clone().requires_grad_()
        chosen = []
        for part in parts:
            logprobs = response_logprobs(model, part, 1.0, Mixed(own, window, path))
            logprobs.sum().backward()  # a sequence at a time: eager attention keeps much
            chosen.append(logprobs.detach())
        assert own.grad is not None
        found[path] = [torch.cat(chosen), own.grad / sum(map(len, chosen))]
    ours, theirs, judge = (found[path] for path in ("auto", "chunked", "reference"))
    result = {"mean log-probability": ours[0].mean().item(), "the judge's": judge[0].mean().item()}
    for name, who in (("ours", ours), ("PyTorch's", theirs)):
        apart = (who[1] - judge[1]).norm(dim=1) / judge[1].norm(dim=1).clamp(min=1e-30)
        result[f"log-probabilities, {name}"] = (who[0] - judge[0]).abs().mean().item()
        result[f"gradient, {name}"] = relative_error(who[1], judge[1])
        result[f"gradient, median layer, {name}"] = apart.median().item()
    print("update, distance from the reference:", {name: f"{value:.3g}" for name, value in result.items()})
    for what in ("log-probabilities", "gradient", "gradient, median layer"):
        require(result[f"{what}, ours"], WORSE * result[f"{what}, PyTorch's"], f"update: {what}")
    return result
