"""Every Triton kernel once on small ragged shapes, against plain PyTorch: the work of scripts/sanitize.sh.

One line a kernel before it ("kernel: NAME") and one after it ("value: ok" or "value: WRONG"), so that what a
sanitizer reports in between is about that kernel. Entries of page tables beyond a row's own lead nowhere, and
pages that nobody owns hold NaN. Runs on a CUDA device, or in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]

from kernel_kit import DEVICE, Paged, attention, make_paged  # noqa: E402

from rlkv import sampling  # noqa: E402
from rlkv.attention.reference import mixed_attention as reference  # noqa: E402
from rlkv.kernels import elementwise, vocabulary  # noqa: E402
from rlkv.kernels.decode import PagedDecoder, store  # noqa: E402
from rlkv.kernels.mixed import mixed_attention  # noqa: E402
from rlkv.kernels.ring import decode_step, store_rows  # noqa: E402
from rlkv.serving.decode import decode_local  # noqa: E402
from rlkv.serving.slots import Slots  # noqa: E402
from rlkv.window import Window  # noqa: E402

CUDA = DEVICE == "cuda"
DTYPE = torch.bfloat16 if CUDA else torch.float32
DIM, GROUP = (128, 4) if CUDA else (16, 2)
NOWHERE = 2**24  # a page far outside of any memory
WINDOW = Window(20, 60)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, DTYPE)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = wanted.detach().double().cpu()
    return ((found.detach().double().cpu() - wanted).norm() / wanted.norm()).item()


def paged(counts: torch.Tensor, page: int) -> Paged:
    """Random pages; table entries beyond a row's own lead nowhere."""
    made = make_paged(counts, DIM, page, DTYPE)
    column = torch.arange(made.table.shape[2], device=DEVICE)
    made.table[column >= (-(-made.counts // page))[..., None]] = NOWHERE
    return made


def decode(page: int, soft: bool) -> float:
    counts = torch.tensor([[1, 700], [80, 81], [333, 64], [0, 517]])
    if soft:
        counts = counts[:, 1:].expand(-1, 2)
    made, query = paged(counts, page), randn(4, 2 * GROUP, DIM)
    gates = torch.rand(4, 1, 2)
    gates[0, 0, 0], gates[1, 0, 1] = 0, 1
    # programs wait for each other: few enough to run at once even when a sanitizer makes them larger
    decoder = PagedDecoder(
        rows=8, query_heads=2 * GROUP, kv_heads=2, head_dim=DIM, device=DEVICE, programs=16 if CUDA else 3
    )
    own = (gates.to(DEVICE), WINDOW) if soft else ()
    plan = decoder.plan(made.counts[None], *own)
    wanted = attention(query, made, DIM**-0.5, gates[:, 0] if soft else None, WINDOW if soft else None)
    states = (made.keys, made.values, made.table)
    return max(error(decoder.attend(query, *states, plan, 0, DIM**-0.5), wanted) for _ in range(3))


def store_tokens() -> float:
    made = paged(torch.tensor([[200, 80], [65, 65], [64, 64]]), 64)
    key, value = randn(3, 2, DIM), randn(3, 2, DIM)
    positions, full = torch.tensor([199, 64, -1]).to(DEVICE), torch.tensor([True, False]).to(DEVICE)
    wanted = [states.clone() for states in (made.keys, made.values)]
    for request, position in enumerate((199, 64)):
        for head, place in enumerate((position, int(WINDOW.slot(torch.tensor(position))))):
            page = int(made.table[request, head, place // 64])
            wanted[0][page, place % 64], wanted[1][page, place % 64] = (
                key[request, head],
                value[request, head],
            )
    store(key, value, made.keys, made.values, made.table, positions, full, WINDOW, early=True)
    pairs = zip((made.keys, made.values), wanted, strict=True)
    return float(not all(found.equal(right) or _same(found, right) for found, right in pairs))


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool(((found == wanted) | (found.isnan() & wanted.isnan())).all())


def mixed(lengths: list[int]) -> float:
    total, closed = sum(lengths), (1,)
    inputs = [randn(total, heads, DIM).requires_grad_() for heads in (2 * GROUP, 2, 2)]
    inputs.append(torch.tensor([0.3, 0.0], device=DEVICE).requires_grad_())
    gradient = randn(total, 2 * GROUP, DIM)
    found = mixed_attention(*inputs, lengths, WINDOW, DIM**-0.5, closed=closed)
    wide = [part.detach().float().requires_grad_() for part in inputs]
    parts = []
    for query, key, value in zip(*(part.split(lengths) for part in wide[:3]), strict=True):
        at = torch.arange(len(query), device=DEVICE)
        seen = (at <= at[:, None], WINDOW.sees(at[:, None], at))
        states = (part.transpose(0, 1)[None] for part in (query, key, value))
        output = reference(*states, wide[3], seen[0][None, None], seen[1][None, None], DIM**-0.5)
        parts.append(output[0].transpose(0, 1))
    wanted = torch.cat(parts)
    pairs = zip(
        [found, *torch.autograd.grad(found, inputs, gradient)],
        [wanted, *torch.autograd.grad(wanted, wide, gradient.float())],
        strict=True,
    )
    return max(error(ours, right) for ours, right in pairs)


def chosen() -> float:
    logits, tokens = randn(5, 9001), torch.tensor([0, 9000, 17, 4096, 4095]).to(DEVICE)
    right = torch.log_softmax(logits.double(), -1)
    slope = torch.nn.functional.one_hot(tokens, 9001) - right.exp()
    found = vocabulary.chosen_softmax_(logits, tokens, 1.0, True)
    return max(error(found, right.gather(1, tokens[:, None])[:, 0]), error(logits, slope))


def draw() -> float:
    logits, keys = randn(7, 9001), sampling.request_keys(3, torch.arange(7)).to(DEVICE)
    mix = (sampling._STEP, sampling._MIX_1, sampling._MIX_2)
    tokens, logprobs = vocabulary.draw(logits, keys, torch.zeros_like(keys), 1.0, mix)
    return error(logprobs, torch.log_softmax(logits.double(), -1).gather(1, tokens[:, None])[:, 0])


def norms() -> float:
    x, residual, weight = randn(5, 200).requires_grad_(), randn(5, 200), randn(200)
    wide = x.detach().float().requires_grad_()
    total = wide + residual.float()
    wanted = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * weight.float()
    found = elementwise.add_norm(x, residual, weight, 1e-5)[0]
    grads = [torch.autograd.grad(part.sum(), source)[0] for part, source in ((found, x), (wanted, wide))]
    return max(error(found, wanted), error(*grads))


def rotary() -> float:
    query, key = randn(5, 2 * GROUP, DIM).requires_grad_(), randn(5, 2, DIM).requires_grad_()
    angle = torch.rand(5, DIM // 2).repeat(1, 2).to(DEVICE)
    cos, sin = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
    found = elementwise.rotary(query, key, cos, sin, None, 1e-6)
    errors = []
    for part, turned in zip((query, key), found, strict=True):
        wide = part.detach().float().requires_grad_()
        halves = torch.cat([-wide[..., DIM // 2 :], wide[..., : DIM // 2]], -1)
        wanted = wide * cos.float()[:, None] + halves * sin.float()[:, None]
        weights = randn(*part.shape)
        ours = torch.autograd.grad((turned * weights).sum(), part, retain_graph=True)[0]
        right = torch.autograd.grad((wanted * weights.float()).sum(), wide)[0]
        errors += [error(turned, wanted), error(ours, right)]
    return max(errors)


def silu() -> float:
    both = randn(5, 2 * 300).requires_grad_()
    wide = both.detach().float().requires_grad_()
    wanted = torch.nn.functional.silu(wide[:, :300]) * wide[:, 300:]
    found = elementwise.silu_times(both)
    grads = [torch.autograd.grad(part.sum(), source)[0] for part, source in ((found, both), (wanted, wide))]
    return max(error(found, wanted), error(*grads))


def ring() -> float:
    """Serving: one full and two local heads, three requests of different lengths."""
    slots, scaling = Slots(WINDOW, 3), DIM**-0.5
    request, length = torch.tensor([2, 1, 3]).to(DEVICE), torch.tensor([1, 80, 131]).to(DEVICE)
    local = [randn(slots.rows, 2, DIM) for _ in "kv"]
    full, rows = [randn(10, 1, DIM) for _ in "kv"], torch.tensor([4, 9, 1]).to(DEVICE)
    query, key, value = randn(3, 3 * GROUP, DIM), randn(3, 3, DIM), randn(3, 3, DIM)
    held, filled = slots.held(request, length)
    output = torch.zeros_like(query)
    pools = ((full[0], full[1]), rows, (local[0], local[1]))
    decode_step(query, key, value, *pools, request, length.int(), WINDOW, scaling, output)
    store_rows(key[:, :1], value[:, :1], full[0], full[1], rows + 0)
    states = [part.float() for part in local]
    wanted = decode_local(query[:, GROUP:].float(), *states, held, filled, scaling)
    return max(error(output[:, GROUP:], wanted), error(full[0][rows], key[:, :1]))


CASES: dict[str, Callable[[], float]] = {
    "decode": lambda: decode(64, False),
    "decode, soft gates": lambda: decode(64, True),
    "decode, pages of 16 tokens": lambda: decode(16, False),
    "store": store_tokens,
    "mixed attention, equal lengths": lambda: mixed([131, 131]),
    "mixed attention, ragged": lambda: mixed([150, 7, 1, 97]),
    "log-probabilities": chosen,
    "drawing": draw,
    "residual and norm": norms,
    "rotary": rotary,
    "SiLU": silu,
    "serving: decode and store": ring,
}


def main() -> None:
    torch.manual_seed(0)
    wrong = []
    for name, work in CASES.items():
        print(f"kernel: {name}", flush=True)
        apart = work()
        if CUDA:
            torch.cuda.synchronize()
            time.sleep(0.2)  # for reports on their way
        good = apart <= (2e-2 if CUDA else 1e-3)
        wrong += [] if good else [name]
        print(f"value: {'ok' if good else 'WRONG'}, relative error {apart:.1e}", flush=True)
    if wrong:
        raise SystemExit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
