"""For the kernels' tests: a device, and head-split paged memory with its definition in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlkv.window import Window

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Paged:
    """Rows of one layer: pages shuffled, everything that no row owns is NaN."""

    keys: torch.Tensor  # [pages, page_size, D]
    values: torch.Tensor
    table: torch.Tensor  # int32 [n, kv_heads, most pages]
    counts: torch.Tensor  # int32 [n, kv_heads]
    rows: list[list[tuple[torch.Tensor, torch.Tensor]]]  # [n][kv_heads]: keys, values [count, D] in order


def make_paged(counts: torch.Tensor, dim: int, page: int, dtype: torch.dtype, seed: int = 0) -> Paged:
    """Random keys and values for ``counts`` int [n, kv_heads] tokens a row."""
    generator = torch.Generator().manual_seed(seed)
    need = -(-counts // page)
    most = max(int(need.max()), 1)
    order = torch.randperm(int(need.sum()) + 3, generator=generator).tolist()  # three pages stay free
    pages = [torch.full((len(order), page, dim), torch.nan) for _ in range(2)]
    table = torch.full((*counts.shape, most), 2**30, dtype=torch.int32)
    rows: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for request, row_counts in enumerate(counts.tolist()):
        rows.append([])
        for head, count in enumerate(row_counts):
            states = [torch.randn(count, dim, generator=generator).to(dtype) for _ in range(2)]
            for index in range(int(need[request, head])):
                table[request, head, index] = place = order.pop()
                for pool, state in zip(pages, states, strict=True):
                    piece = state[index * page : (index + 1) * page]
                    pool[place, : len(piece)] = piece.float()
            rows[-1].append((states[0], states[1]))
    table[table == 2**30] = order[0] if order else 0  # somebody's NaN
    return Paged(
        pages[0].to(DEVICE, dtype),
        pages[1].to(DEVICE, dtype),
        table.to(DEVICE),
        counts.int().to(DEVICE),
        rows,
    )


def attention(
    query: torch.Tensor, paged: Paged, scaling: float, gates: torch.Tensor | None, window: Window | None
) -> torch.Tensor:
    """query [n, Hq, D] -> float64, like query; ``gates`` [n, kv_heads]: gate * full + (1 - gate) * local."""
    count, heads, dim = query.shape
    kv_heads = paged.counts.shape[1]
    output = torch.zeros(count, kv_heads, heads // kv_heads, dim, dtype=torch.float64)
    queries = query.cpu().double().view(output.shape)
    for request in range(count):
        for head in range(kv_heads):
            keys, values = (state.double() for state in paged.rows[request][head])
            if not len(keys):
                continue
            scores = queries[request, head] @ keys.T * scaling
            weights = scores.softmax(-1)
            if gates is not None and window is not None:
                last = torch.tensor(len(keys) - 1)
                seen = window.sees(last, torch.arange(len(keys)))
                local = scores.masked_fill(~seen, -torch.inf).softmax(-1)
                gate = gates[request, head].double().item()
                weights = gate * weights + (1 - gate) * local
            output[request, head] = weights @ values
    return output.view(query.shape)
