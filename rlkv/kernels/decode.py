"""Attention of one new token a request over head-split paged memory: full and local heads in one launch.

A page holds ``page_size`` tokens of one (layer, KV head). A row is one (request, KV head): it has its own
list of pages and its own count of tokens, so that full rows (every token) and local rows (a ring of sink +
recent, :meth:`rlkv.window.Window.slot`) are the same thing to the kernel, which never needs to know which is
which: softmax doesn't care for order.

    decoder = PagedDecoder(rows=n * kv_heads, query_heads=32, kv_heads=8, head_dim=128, device=device)
    counts = held_counts(positions + 1, mask, window)                  # [layers, n, kv_heads]
    plan = decoder.plan(counts)                                        # once a step, for all layers
    for layer in ...:
        store(key, value, keys, values, table[layer], positions, mask[layer], window)
        output = decoder.attend(query, keys, values, table[layer], plan, layer, scaling)

All work is divided on the device, in equal shares of blocks that may begin and end within a row (split-KV
with as many splits as a row's true length asks for), so a captured CUDA graph stays right while lengths grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlkv.errors import RLKVError
from rlkv.kernels import check_device, check_head_dim
from rlkv.kernels.decode_kernels import decode_kernel
from rlkv.kernels.decode_plan import SHARE, make_shares
from rlkv.kernels.store import overlaps_launches, store
from rlkv.window import Window

__all__ = ["DecodePlan", "PagedDecoder", "Tuning", "held_counts", "store"]

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class DecodePlan:
    """Who reads what in one step, for every layer; all tensors on the device.

    ``counts`` int32 [layers, n, kv_heads]; ``shares`` int32 [layers, programs, 8]: each program's first row,
    first block of that row, blocks, that row's count and the next one's; which program begins the row, and
    how many share it, or 0 for one; how many share the last row, if it is another one, or 0 for one.
    ``gates`` float32 [layers, n * kv_heads] with ``window``, or None.
    """

    counts: torch.Tensor
    shares: torch.Tensor
    gates: torch.Tensor | None = None
    window: Window | None = None


@dataclass(frozen=True)
class Tuning:
    """Keys a block, programs a multiprocessor, fewest blocks a program, Triton's, parts merged at once.

    ``early``: begin while the kernel before ends (programmatic dependent launch), where the GPU can: look up
    what is to be read, and call the first ``ahead`` (1, 2, 3..) blocks of each program to the L2 cache. The
    first attention after a plan does not; tables must not change between a plan's first and last attention.
    ``programs_per_sm`` should be as many as fit, or early programs of one launch crowd some multiprocessors.
    """

    block: int = 64
    programs_per_sm: int = 2
    least_blocks: int = 2
    warps: int = 4
    stages: int = 3
    parts: int = 8
    early: bool = True
    ahead: int = 2


def held_counts(lengths: torch.Tensor, full: torch.Tensor, window: Window) -> torch.Tensor:
    """Tokens each row holds, int32 [layers, n, kv_heads].

    ``lengths`` int [n]; ``full`` bool [layers, kv_heads].
    """
    lengths = lengths[None, :, None]
    return torch.where(full[:, None], lengths, lengths.clamp(max=window.size)).int()


class PagedDecoder:
    """Scratch memory and launch parameters for up to ``rows`` (request, KV head) rows of one model."""

    def __init__(
        self,
        *,
        rows: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        programs: int | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        check_head_dim(head_dim)
        if query_heads % kv_heads:
            raise RLKVError(f"decoder: {query_heads} query heads can't share {kv_heads} KV heads evenly")
        self.tuning = tuning or Tuning()
        if programs is None:
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            programs = processors * self.tuning.programs_per_sm
        self.programs, self._rows, self._kv_heads = programs, rows, kv_heads
        self._group, self._dim = query_heads // kv_heads, head_dim
        self._tile = 1 << (self._group - 1).bit_length()
        self._early = self.tuning.early and overlaps_launches(torch.device(device))
        self._begun: DecodePlan | None = None
        parts = (2 * programs, 2, self._tile)  # a program shares its first and its last row with others
        self._part_values = torch.empty(*parts, head_dim, dtype=torch.float32, device=device)
        self._part_logs = torch.empty(parts, dtype=torch.float32, device=device)
        self._arrivals = torch.zeros(rows, dtype=torch.int32, device=device)

    def plan(
        self, counts: torch.Tensor, gates: torch.Tensor | None = None, window: Window | None = None
    ) -> DecodePlan:
        """Divide a step: ``counts`` int32 [layers, n, kv_heads], tokens held by each row with the new one.

        With ``gates`` float32 [n, layers, kv_heads] and their ``window`` (soft gates: every row holds all of
        its tokens, in order) the output is gate * full + (1 - gate) * local attention, from one reading of
        the keys; rows whose gate is 0 read their window alone.
        """
        if gates is not None and window is None:
            raise RLKVError("decoder: soft gates need a window")
        sizes = (0, 0) if window is None else (window.sink, window.recent)
        counts = counts.int().contiguous()
        tuning, rows = self.tuning, counts[0].numel()
        if not 0 < rows <= self._rows:
            raise RLKVError(f"decoder: made for 1 to {self._rows} rows, got {rows}")
        shares, row_gates = make_shares(
            counts, gates, sizes, tuning.block, self.programs, tuning.least_blocks, self._rows
        )
        return DecodePlan(counts, shares, row_gates, window)

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        table: torch.Tensor,
        plan: DecodePlan,
        layer: int,
        scaling: float,
        scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [n, Hq, D] over pages ``keys``, ``values`` [pages, page_size, D] -> like query.

        ``table`` int32 [n, kv_heads, most pages of a row]: pages of each row, in order; entries beyond a
        row's count are never followed. ``scales`` float32 [2, kv_heads]: what stored keys and values (fp8,
        say) are to be multiplied with. A row that holds nothing gives 0.
        """
        self._check(query, keys, values, table, plan)
        query = query.contiguous()
        count, heads, _ = query.shape
        output = torch.empty_like(query)
        tuning, soft = self.tuning, plan.gates is not None
        early, self._begun = self._early and self._begun is plan, plan
        decode_kernel[(self.programs,)](
            query,
            keys,
            values,
            table,
            output,
            plan.counts[layer],
            plan.counts if plan.gates is None else plan.gates[layer],
            self._part_logs if scales is None else scales,
            plan.shares[layer],
            self._part_values,
            self._part_logs,
            self._arrivals,
            scaling * LOG2_E,
            0 if plan.window is None else plan.window.sink,
            0 if plan.window is None else plan.window.recent,
            count * self._kv_heads,
            self._kv_heads,
            table.stride(1),
            GROUP=self._group,
            GROUP_TILE=self._tile,
            TILES=max(16 // self._tile, 2 if soft else 1),
            PAGE=keys.shape[1],
            BLOCK=tuning.block,
            DIM=self._dim,
            SOFT=soft,
            SCALED=scales is not None,
            WIDE="ieee",
            PARTS=tuning.parts,
            EARLY=early,
            AHEAD=tuning.ahead,
            SHARE=SHARE,
            launch_pdl=early,
            num_warps=tuning.warps,
            num_stages=tuning.stages,
        )
        return output

    def _check(self, query: Any, keys: Any, values: Any, table: Any, plan: DecodePlan) -> None:
        check_device(query, keys, values, table)
        page, block = keys.shape[1], self.tuning.block
        if page % block and block % page:
            raise RLKVError(f"decoder: pages of {page} tokens and blocks of {block} don't divide each other")
        if table.shape[2] * page < block:
            raise RLKVError(f"decoder: rows of the table need room for a block of {block} tokens")
        if query.shape[1:] != (self._group * self._kv_heads, self._dim) or keys.shape[2] != self._dim:
            raise RLKVError(
                f"decoder: made for {self._group * self._kv_heads} query heads of dim {self._dim}, got query "
                f"{list(query.shape)} and pages {list(keys.shape)}"
            )
        if not (keys.is_contiguous() and values.is_contiguous() and keys.shape == values.shape):
            raise RLKVError("decoder: pages of keys and of values must be contiguous and of one shape")
        if len(query) * self._kv_heads * -(-table.shape[2] * page // block) * self.programs >= 2**31:
            raise RLKVError(f"decoder: a table of {list(table.shape)} pages is too large for 32-bit shares")
        rows, strides = len(query) * self._kv_heads, table.stride()
        even = len(table) == 1 or strides[0] == self._kv_heads * strides[1]
        if rows > self._rows or table.dtype != torch.int32 or strides[2] != 1 or not even:
            raise RLKVError(
                f"decoder: needs at most {self._rows} rows and an int32 table whose rows follow each other, "
                f"got {rows} rows and {table.dtype} with strides {strides}"
            )
