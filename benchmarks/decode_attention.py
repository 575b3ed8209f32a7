"""Decode attention over head-split pages, beside no mask, two launches, and PyTorch's attention.

    python benchmarks/decode_attention.py --gates GATES --json decode.json      # a gates folder or .tsv

Every layer runs with its own heads of the mask; times are sums over the layers, one after the other in one
CUDA graph. Nothing that is read is in the L2 cache: pages are drawn from a large pool, and a graph holds as
many steps, each with pages of its own, as read four times the cache's size. GB/s counts the keys and values
that must be read; "% copy" is that over a device copy's bandwidth (bytes read and written), measured in the
same run; "% reading" is over a kernel that only reads as many bytes (reading.py). "full" is our kernel with
every head full, "two" is our kernel launched for full and local heads apart, with queries gathered for free
and launches overlapping too, "two late" the same with ordinary launches. "stored" has each layer's new token
stored before, as in the sampler, "soft" has gates between 0 and 1 and no mask. PyTorch's attention reads
contiguous full caches. About 30 s when its kernels are compiled, 80 before;
--flex adds FlexAttention, which is compiled for every shape.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import (
    card,
    copy_bandwidth,
    need_cuda,
    print_table,
    relative_error,
    require,
    time_graph,
    write_json,
)
from reading import reading_seconds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from rlkv.gates import HeadGates
from rlkv.kernels.decode import DecodePlan, PagedDecoder, Tuning, held_counts, store
from rlkv.window import Window

DIM = 128
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "flex": None}
COLD = 4  # L2 caches that a graph reads at least


def steps_for(size: int) -> int:
    """How often ``size`` bytes, other ones each time, must be read to leave nothing in the L2 cache."""
    return max(1, -(-COLD * torch.cuda.get_device_properties(0).L2_cache_size // max(size, 1)))


class Pool:
    """Pages for every layer of one case, in random order, owned one after the other and then over again."""

    def __init__(self, gigabytes: float, page: int, device: torch.device) -> None:
        pages = int(gigabytes * 1e9) // (page * DIM * 4)
        self.page = page
        self.keys, self.values = (
            torch.randn(pages, page, DIM, dtype=torch.bfloat16, device=device) for _ in range(2)
        )
        self._order = torch.randperm(pages, device=device).int()

    def table(self, counts: torch.Tensor) -> torch.Tensor:
        """Pages for ``counts`` int [.., n, kv_heads]: int32 [.., n, kv_heads, most pages]."""
        need = (counts.long() + self.page - 1) // self.page
        first = need.flatten().cumsum(0).view(need.shape) - need
        index = first[..., None] + torch.arange(int(need.max()), device=counts.device)
        return self._order[index % len(self._order)]


class Case:
    """One batch at given lengths (int32 [n]), under a mask bool [layers, kv_heads]."""

    def __init__(
        self,
        pool: Pool,
        lengths: torch.Tensor,
        full: torch.Tensor,
        window: Window,
        groups: int,
        tuning: Tuning,
    ) -> None:
        self.pool, self.full, self.groups, self.tuning = pool, full, groups, tuning
        self.lengths, self.window = lengths, window
        self.counts = held_counts(lengths, full, window)
        self.steps = steps_for(self.bytes)
        self.tables = pool.table(self.counts.expand(self.steps, -1, -1, -1))  # by step, layer
        self.query = torch.randn(
            len(lengths), full.shape[1] * groups, DIM, dtype=torch.bfloat16, device=lengths.device
        )

    @property
    def bytes(self) -> int:
        """Keys and values that one step reads."""
        return int(self.counts.long().sum()) * DIM * 4

    def decoder(self, kv_heads: int, early: bool = True) -> PagedDecoder:
        return PagedDecoder(
            rows=len(self.query) * kv_heads,
            query_heads=kv_heads * self.groups,
            kv_heads=kv_heads,
            head_dim=DIM,
            device=self.query.device,
            tuning=replace(self.tuning, early=self.tuning.early and early),
        )

    def seconds_of_reading(self) -> float:
        """A launch a layer that only reads as many bytes."""
        sizes = [int(held.long().sum()) * DIM * 4 for held in self.counts]
        return reading_seconds(self.pool.keys, sizes, self.steps)

    def seconds(
        self, gates: torch.Tensor | None = None, window: Window | None = None, stored: bool = False
    ) -> float:
        """All layers, one launch each, after another one that stores the new token if ``stored``."""
        decoder = self.decoder(self.full.shape[1])
        plan = decoder.plan(self.counts, gates, window)
        keys, values = self.pool.keys, self.pool.values
        new = torch.randn_like(self.query[:, : self.full.shape[1]])
        positions = self.lengths.long() - 1

        def step(table: torch.Tensor, layer: int) -> None:
            if stored:
                pages = (new, new, keys, values, table, positions)
                store(*pages, self.full[layer], self.window, early=self.tuning.early)
            self.attend(decoder, self.query, table, plan, layer)

        def steps() -> None:
            for tables in self.tables:
                for layer, table in enumerate(tables):
                    step(table, layer)

        return time_graph(steps) / self.steps

    def seconds_in_two(self, early: bool = True) -> float:
        """All layers, full and local heads apart; ``early``: launches overlap."""
        launches: list[tuple[Any, ...]] = []
        queries = self.query.unflatten(1, (-1, self.groups))
        for tables in self.tables:
            for layer, full in enumerate(self.full):
                for heads in (full.nonzero()[:, 0], (~full).nonzero()[:, 0]):
                    if len(heads):
                        decoder = self.decoder(len(heads), early)
                        plan = decoder.plan(self.counts[layer : layer + 1, :, heads])
                        query, table = queries[:, heads].flatten(1, 2), tables[layer][:, heads]
                        launches.append((decoder, query.contiguous(), table.contiguous(), plan, 0))
        return time_graph(lambda: [self.attend(*launch) for launch in launches]) / self.steps

    def attend(
        self, decoder: PagedDecoder, query: torch.Tensor, table: torch.Tensor, plan: DecodePlan, layer: int
    ) -> torch.Tensor:
        return decoder.attend(query, self.pool.keys, self.pool.values, table, plan, layer, DIM**-0.5)


def check(full: torch.Tensor, window: Window, groups: int, page: int, tuning: Tuning) -> dict[str, float]:
    """Errors against float64 on random ragged lengths, everything that no row owns being NaN.

    Ours must not exceed 1.5 times those of PyTorch's own attention in half precision.
    """
    device, heads = full.device, full.shape[1]
    lengths = torch.cat([torch.tensor([1, window.size]), torch.randint(1, 4000, (8,))]).int().to(device)
    mixed = full[(full.sum(1) - heads / 2).abs().argmin()][None]
    errors: dict[str, float] = {}
    for name, mask in (("hard", mixed), ("soft", torch.ones_like(mixed))):
        pool = Pool(0.4, page, device)
        case = Case(pool, lengths, mask, window, groups, tuning)
        cells = _cells(case)
        owned = torch.zeros(len(pool.keys) * page, dtype=torch.bool, device=device)
        owned[torch.cat(list(cells.values()))] = True
        for states in (pool.keys, pool.values):
            states.flatten(0, 1)[~owned] = torch.nan
        gates = torch.rand(len(lengths), 1, heads, device=device)
        gates[0], gates[-1, 0, 0], gates[-1, 0, 1] = 1, 0, 1
        decoder = case.decoder(heads)
        plan = decoder.plan(case.counts, gates, window) if name == "soft" else decoder.plan(case.counts)
        found = torch.full_like(case.query, torch.nan)
        for _ in range(3):  # later ones begin early, and find what the first left behind
            found = case.attend(decoder, case.query, case.tables[0, 0], plan, 0)
        exact, rounded = torch.zeros_like(found, dtype=torch.float64), torch.zeros_like(found)
        for (row, head), where in cells.items():
            rows = slice(head * groups, (head + 1) * groups)
            states = (case.query[row, rows], pool.keys.flatten(0, 1)[where], pool.values.flatten(0, 1)[where])
            gate = gates[row, 0, head] if name == "soft" else None
            exact[row, rows] = _attention(*(x.double() for x in states), window, gate)
            rounded[row, rows] = _attention(*states, window, gate)
        errors[name], theirs = relative_error(found, exact), relative_error(rounded, exact)
        errors[f"{name} pytorch"] = theirs
        require(errors[name], min(2e-2, 1.5 * theirs), f"{name} decode")
    return errors


def _cells(case: Case) -> dict[tuple[int, int], torch.Tensor]:
    """Where the tokens of each (request, head) are in the first layer."""
    page, cells = case.pool.page, {}
    for row, counts in enumerate(case.counts[0].tolist()):
        for head, count in enumerate(counts):
            position = torch.arange(count, device=case.counts.device)
            pages = case.tables[0, 0, row, head][position // page].long()
            cells[row, head] = pages * page + position % page
    return cells


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: Window, gate: torch.Tensor | None
) -> torch.Tensor:
    """Of one row, by PyTorch, in the dtype that is given."""
    output = F.scaled_dot_product_attention(query[None], key[None], value[None])[0]
    if gate is None:
        return output
    at = torch.arange(len(key), device=key.device)
    sees = window.sees(at[-1], at)
    local = F.scaled_dot_product_attention(query[None], key[None, sees], value[None, sees])[0]
    return torch.lerp(local, output, gate.to(output.dtype))


def peer_seconds(pool: Pool, batch: int, length: int, heads: int, groups: int, name: str) -> float:
    """One layer of PyTorch's attention over a contiguous full cache."""
    shape = (batch, heads, length, DIM)
    copies = steps_for(4 * math.prod(shape))
    keys, values = (
        x.flatten()[: copies * math.prod(shape)].view(copies, *shape) for x in (pool.keys, pool.values)
    )
    caches = list(zip(keys, values, strict=True))
    query = torch.randn(batch, heads * groups, 1, DIM, dtype=torch.bfloat16, device=pool.keys.device)
    attend: Callable[..., torch.Tensor] = F.scaled_dot_product_attention
    if name == "flex":
        attend = torch.compile(flex_attention, dynamic=False)
        return time_graph(lambda: [attend(query, *c, enable_gqa=True) for c in caches]) / len(caches)
    with sdpa_kernel(PEERS[name]):
        return time_graph(lambda: [attend(query, *c, enable_gqa=True) for c in caches]) / len(caches)


def measure(
    args: argparse.Namespace, pool: Pool, full: torch.Tensor, batch: int, length: int, ragged: bool,
    copy: float, tuning: Tuning,
) -> dict[str, Any]:  # fmt: skip
    device, window, groups = full.device, Window.parse(args.window), args.query_heads // full.shape[1]
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    if ragged:
        generator = torch.Generator().manual_seed(batch)
        lengths = torch.randint(length // 4, length + 1, (batch,), generator=generator).int().to(device)
    ours = Case(pool, lengths, full, window, groups, tuning)
    seconds = ours.seconds()
    row: dict[str, Any] = {
        "batch": batch,
        "length": f"{length // 4}-{length}" if ragged else str(length),
        "ours_us": seconds * 1e6,
        "GB/s": ours.bytes / seconds / 1e9,
        "% copy": 100 * ours.bytes / seconds / copy,
    }
    if args.quick:
        return row
    row["stored_us"] = ours.seconds(stored=True) * 1e6
    row["reading_us"] = ours.seconds_of_reading() * 1e6
    row["% reading"] = 100 * row["reading_us"] / row["ours_us"]
    row["two/ours"] = ours.seconds_in_two() / seconds
    row["two late/ours"] = ours.seconds_in_two(early=False) / seconds
    whole = Case(pool, lengths, torch.ones_like(full), window, groups, tuning)
    row["full_us"] = whole.seconds() * 1e6
    row["full reading_us"] = whole.seconds_of_reading() * 1e6
    row["full % copy"] = 100 * whole.bytes / row["full_us"] * 1e6 / copy
    row["time/full"] = seconds * 1e6 / row["full_us"]
    row["bytes/full"] = ours.bytes / whole.bytes
    gates = torch.rand(batch, *full.shape, device=device)
    soft = whole.seconds(gates, Window.parse(args.soft_window))
    row["soft_us"], row["soft % copy"] = soft * 1e6, 100 * whole.bytes / soft / copy
    for name in PEERS if args.flex else [name for name in PEERS if name != "flex"]:
        row[f"{name}_full_us"] = float("nan")
        size = batch * length * full.shape[1] * DIM
        if not ragged and size * steps_for(4 * size) <= pool.keys.numel():
            try:
                one = peer_seconds(pool, batch, length, full.shape[1], groups, name)
                row[f"{name}_full_us"] = one * len(full) * 1e6
            except RuntimeError as error:
                print(f"{name}: {str(error).splitlines()[0]}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gates", required=True, help="a gates folder or table; its mask gives each layer's heads"
    )
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--window", default="16+64")
    parser.add_argument("--soft-window", default="128+256", help="of the rows with soft gates")
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--length", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--page", type=int, default=64, help="tokens a page")
    parser.add_argument("--gigabytes", type=float, default=6.0, help="of the pool")
    parser.add_argument("--block", type=int, default=Tuning.block)
    parser.add_argument("--programs-per-sm", type=int, default=Tuning.programs_per_sm)
    parser.add_argument("--least-blocks", type=int, default=Tuning.least_blocks)
    parser.add_argument("--warps", type=int, default=Tuning.warps)
    parser.add_argument("--stages", type=int, default=Tuning.stages)
    parser.add_argument("--parts", type=int, default=Tuning.parts)
    parser.add_argument("--ahead", type=int, default=Tuning.ahead)
    parser.add_argument("--late", action="store_true", help="without overlapping launches")
    parser.add_argument("--flex", action="store_true", help="time FlexAttention too")
    parser.add_argument("--quick", action="store_true", help="time ours only")
    parser.add_argument("--json")
    args = parser.parse_args()
    device = need_cuda()
    torch.manual_seed(0)
    names = ("block", "programs_per_sm", "least_blocks", "warps", "stages", "parts", "ahead")
    tuning = Tuning(early=not args.late, **{name: getattr(args, name) for name in names})
    full = HeadGates.load(args.gates).mask(args.sparsity).full.to(device)
    window = Window.parse(args.window)
    errors = check(full, window, args.query_heads // full.shape[1], args.page, tuning)
    print("relative errors:", {name: f"{value:.1e}" for name, value in errors.items()})
    copy = copy_bandwidth()
    print(f"{card()}, copy {copy / 1e12:.2f} TB/s, full heads a layer {full.sum(1).tolist()}")
    pool = Pool(args.gigabytes, args.page, device)
    rows = []
    for batch in args.batch:
        for length in args.length:
            for ragged in (False, True) if batch > 1 else (False,):
                rows.append(measure(args, pool, full, batch, length, ragged, copy, tuning))
    print_table(rows)
    write_json(args.json, {**card(), "copy": copy, "errors": errors, "tuning": vars(tuning), "rows": rows})


if __name__ == "__main__":
    main()
