"""The kernels compiled, in half precision, at real sizes; tests/kernels has their rules."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from kernel_kit import attention, make_paged

from rlkv.attention.chunked import mixed_chunked
from rlkv.attention.reference import mixed_attention as reference
from rlkv.window import Window

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
WINDOW = Window(128, 256)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = wanted.double().cpu()
    return ((found.double().cpu() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    "dim, group, page", [(128, 4, 64), (128, 1, 16), (64, 7, 64), (64, 8, 32), (16, 2, 16)]
)
@pytest.mark.parametrize("soft", [False, True])
def test_decode_of_ragged_rows(dim: int, group: int, page: int, soft: bool) -> None:
    from rlkv.kernels.decode import PagedDecoder

    generator = torch.Generator().manual_seed(dim + group)
    counts = torch.randint(1, 1500, (5, 4), generator=generator)
    counts[0, 0], counts[1, 1], counts[2] = 1, 384, 385
    if soft:
        counts = counts[:, :1].expand(-1, 4)
    paged = make_paged(counts, dim, page, torch.bfloat16)
    query = torch.randn(5, 4 * group, dim, generator=generator).bfloat16().cuda()
    gates = torch.rand(5, 1, 4, generator=generator)
    gates[0], gates[1, 0, 1], gates[3, 0, 2], gates[2, 0, 0] = 1, 0, 0, 1
    decoder = PagedDecoder(rows=20, query_heads=4 * group, kv_heads=4, head_dim=dim, device="cuda")
    plan = decoder.plan(paged.counts[None], *((gates.cuda(), WINDOW) if soft else ()))
    wanted = attention(query, paged, dim**-0.5, *((gates[:, 0], WINDOW) if soft else (None, None)))
    for _ in range(2):
        found = decoder.attend(query, paged.keys, paged.values, paged.table, plan, 0, dim**-0.5)
        assert error(found, wanted) < 4e-3


def test_decode_of_fp8_pages() -> None:
    from rlkv.kernels.decode import PagedDecoder

    paged = make_paged(torch.tensor([[700, 80], [33, 1200]]), 128, 64, torch.float8_e4m3fn)
    query = torch.randn(2, 8, 128).bfloat16().cuda()
    decoder = PagedDecoder(rows=4, query_heads=8, kv_heads=2, head_dim=128, device="cuda")
    plan = decoder.plan(paged.counts[None])
    scales = torch.tensor([[0.5, 2.0], [3.0, 0.25]])
    for rows in paged.rows:
        for head, (key, value) in enumerate(rows):
            rows[head] = (key.double() * scales[0, head], value.double() * scales[1, head])
    wanted = attention(query, paged, 128**-0.5, None, None)
    found = decoder.attend(query, paged.keys, paged.values, paged.table, plan, 0, 128**-0.5, scales.cuda())
    assert error(found, wanted) < 4e-3


def test_what_is_stored_in_fp8_is_attended_to_as_it_was_rounded() -> None:
    from rlkv.kernels.decode import PagedDecoder, store

    window, dim, count = Window(16, 64), 128, 300
    mask, scales = torch.tensor([True, False]), torch.tensor([[0.5, 0.03125], [0.25, 2.0]])
    held = torch.tensor([[count, window.size], [77, 77]])
    paged = make_paged(held, dim, 64, torch.float8_e4m3fn)
    states = torch.randn(2, count, 2, 2, dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    pools = (paged.keys, paged.values, paged.table)
    for position in range(count):
        key, value = states[:, position].cuda()
        positions = torch.tensor([position, position if position < 77 else -1], device="cuda")
        store(key, value, *pools, positions, mask.cuda(), window, scales.cuda())
    for request, length in enumerate((count, 77)):
        for head in range(2):
            at = torch.arange(length)
            seen = at >= 0 if mask[head] else window.sees(at[-1], at)
            scale = scales[:, head, None, None].double()
            rounded = (states[:, :length, request, head].double() / scale).to(torch.float8_e4m3fn).double()
            key, value = (rounded * scale)[:, seen]
            paged.rows[request][head] = (key, value)
    query = torch.randn(2, 8, dim).bfloat16().cuda()
    decoder = PagedDecoder(rows=4, query_heads=8, kv_heads=2, head_dim=dim, device="cuda")
    found = decoder.attend(query, *pools, decoder.plan(paged.counts[None]), 0, dim**-0.5, scales.cuda())
    assert error(found, attention(query, paged, dim**-0.5, None, None)) < 4e-3


@pytest.mark.parametrize("window", [Window(4, 16), Window(0, 33)])
@pytest.mark.parametrize("hard", [False, True])
def test_the_paged_samplers_logprobs_are_the_trainers(window: Window, hard: bool) -> None:
    """In bf16, to rounding: a window one token longer would be 0.16 and more away on average."""
    from test_sampler_gpu import KV_HEADS, LAYERS, make, make_prompts

    from rlkv.attention import Mixed
    from rlkv.logprobs import on_kernels, response_logprobs
    from rlkv.paged import PagedSampler
    from rlkv.sampler import SamplingParams

    model, prompts = make(torch.bfloat16), make_prompts(16)
    gates = torch.rand(LAYERS, KV_HEADS, generator=torch.Generator().manual_seed(1))
    gates = gates.round() if hard else gates
    sampler = PagedSampler(model, window, slots=8, max_length=300)
    assert sampler._cache.on_kernels and on_kernels(model)
    params = SamplingParams(max_new_tokens=60, temperature=0.9, seed=5)
    completions = sampler.generate(prompts, params, gates)
    rows = [(prompt, done.tokens) for prompt, done in zip(prompts, completions, strict=True)]
    with torch.no_grad():
        wanted = response_logprobs(model, rows, 0.9, Mixed(gates.cuda(), window)).cpu()
    gap = (torch.tensor([logprob for done in completions for logprob in done.logprobs]) - wanted).abs()
    assert gap.mean() < 0.05 and gap.max() < 0.5


@pytest.mark.parametrize("early", [False, True])
def test_a_captured_step_stays_right_while_lengths_grow(early: bool) -> None:
    """Three layers, as the sampler runs them: a plan, then in each a new token stored and attended to.

    With ``early`` every launch but the first begins while the one before it runs, and reads what that made.
    """
    from rlkv.kernels.decode import PagedDecoder, Tuning, held_counts, store

    window, layers, capacity, dim = Window(16, 64), 3, 1024, 128
    mask = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4], device="cuda")
    caches = [make_paged(torch.full((3, 4), capacity), dim, 64, torch.bfloat16) for _ in range(layers)]
    lengths = torch.tensor([0, 40, 700], device="cuda")
    states = torch.randn(2, capacity, layers, 3, 4, dim, device="cuda", dtype=torch.bfloat16)  # by position
    for position in range(700):
        positions = torch.where(position < lengths, position, -1)
        for layer, paged in enumerate(caches):
            pools = (paged.keys, paged.values, paged.table)
            store(*states[:, position, layer], *pools, positions, mask[layer], window)
    positions, query = lengths.clone(), torch.randn(3, 16, dim, device="cuda", dtype=torch.bfloat16)
    request = torch.arange(3, device="cuda")
    decoder = PagedDecoder(
        rows=12, query_heads=16, kv_heads=4, head_dim=dim, device="cuda", tuning=Tuning(early=early)
    )

    def step() -> list[torch.Tensor]:
        plan = decoder.plan(held_counts(positions + 1, mask, window))
        outputs = []
        for layer, paged in enumerate(caches):
            key, value = (part[positions, layer, request] for part in states)
            pools = (paged.keys, paged.values, paged.table)
            store(key, value, *pools, positions, mask[layer], window, early=early)
            outputs.append(decoder.attend(query, *pools, plan, layer, dim**-0.5))
        positions.add_(1)
        return outputs

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for _ in range(200):
        graph.replay()
    assert positions.tolist() == [201, 241, 901]
    for layer, output in enumerate(outputs):
        for row, length in enumerate(positions.tolist()):
            at = torch.arange(length, device="cuda")
            for head in range(4):
                seen = at >= 0 if mask[layer, head] else window.sees(at[-1], at)
                key, value = states[:, :length, layer, row, head][:, seen].double()
                queries = query[row, 4 * head : 4 * head + 4].double()
                wanted = (queries @ key.T * dim**-0.5).softmax(-1) @ value
                assert error(output[row, 4 * head : 4 * head + 4], wanted) < 4e-3


def test_early_launches_one_after_the_other_give_what_late_ones_do() -> None:
    """A long chain of attentions, each reading the query that the one before wrote."""
    from rlkv.kernels.decode import PagedDecoder, Tuning

    counts = torch.randint(1, 900, (24, 8), generator=torch.Generator().manual_seed(0))
    paged = make_paged(counts, 128, 64, torch.bfloat16)
    query = torch.randn(24, 32, 128, device="cuda", dtype=torch.bfloat16)
    found = []
    for early in (False, True):
        tuning = Tuning(early=early)
        decoder = PagedDecoder(
            rows=192, query_heads=32, kv_heads=8, head_dim=128, device="cuda", tuning=tuning
        )
        plan, state = decoder.plan(paged.counts.expand(40, -1, -1)), query
        for layer in range(40):
            output = decoder.attend(state, paged.keys, paged.values, paged.table, plan, layer, 1.0)
            state = output if layer % 2 else output + query
        found.append(state)
    assert found[0].isfinite().all() and (found[0] - found[1]).abs().max() < 0.05


@pytest.mark.parametrize(
    "lengths, window, group, dim",
    [
        ([1500], WINDOW, 4, 128),
        ([700, 700], Window(16, 64), 4, 64),
        ([900, 60, 1, 1300], Window(64, 100), 4, 128),
        ([385, 384, 1000], WINDOW, 1, 64),
        ([500], Window(0, 33), 8, 128),
        ([385], WINDOW, 2, 128),
        ([1000], WINDOW, 7, 128),
    ],
)
def test_training_attention_is_as_exact_as_pytorchs(
    lengths: list[int], window: Window, group: int, dim: int
) -> None:
    from rlkv.kernels.mixed import mixed_attention

    torch.manual_seed(0)
    heads, total = 4, sum(lengths)
    shapes = [(total, heads * group, dim), (total, heads, dim), (total, heads, dim)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    inputs.append(torch.rand(heads, device="cuda").requires_grad_())
    gradient = torch.randn_like(inputs[0])

    def each(attend: object, states: list[torch.Tensor]) -> list[torch.Tensor]:
        outputs = []
        for parts in zip(*(part.split(lengths) for part in states[:3]), strict=True):
            outputs.append(attend(*(part.transpose(0, 1)[None] for part in parts), states[3]))  # type: ignore[operator]
        output = torch.cat([part[0].transpose(0, 1) for part in outputs])
        return [output, *torch.autograd.grad(output, states, gradient.to(output.dtype))]

    def exact(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gates: torch.Tensor
    ) -> torch.Tensor:
        at = torch.arange(query.shape[2], device="cuda")
        full, local = at <= at[:, None], window.sees(at[:, None], at)
        return reference(query, key, value, gates, full[None, None], local[None, None], dim**-0.5)

    wanted = each(exact, [part.detach().float().requires_grad_() for part in inputs])
    theirs = each(lambda *states: mixed_chunked(*states, window, dim**-0.5), inputs)
    output = mixed_attention(*inputs, lengths, window, dim**-0.5)
    found = [output, *torch.autograd.grad(output, inputs, gradient)]
    for ours, other, right in zip(found, theirs, wanted, strict=True):
        assert error(ours, right) < max(1.5 * error(other, right), 3e-3)
