"""Decode attention over head-split pages, beside no mask, two launches, and PyTorch's attention.

    python benchmarks/decode_attention.py --gates GATES --json decode.json      # a gates folder or .tsv

Every layer runs with its own heads of the mask; times are sums over the layers, captured as one CUDA graph;
pages are drawn from a pool far larger than the L2 cache. GB/s counts the keys and values that must be read;
"% copy" is that over a device copy's bandwidth, measured in the same run. "full" is our kernel with every
head full, "two" is our kernel launched for full and local heads apart (with queries gathered for free),
"soft" has gates between 0 and 1 and no mask. About 40 s.
"""

from __future__ import annotations

import argparse
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlkv.gates import HeadGates
from rlkv.kernels.decode import DecodePlan, PagedDecoder, Tuning, held_counts
from rlkv.window import Window

DIM = 128
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


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
        """Pages for ``counts`` int [layers, n, kv_heads]: int32 [layers, n, kv_heads, most pages]."""
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
        self.counts = held_counts(lengths, full, window)
        self.table = pool.table(self.counts)
        self.query = torch.randn(
            len(lengths), full.shape[1] * groups, DIM, dtype=torch.bfloat16, device=lengths.device
        )

    @property
    def bytes(self) -> int:
        return int(self.counts.long().sum()) * DIM * 4

    def _decoder(self, kv_heads: int) -> PagedDecoder:
        return PagedDecoder(
            rows=len(self.query) * kv_heads,
            query_heads=kv_heads * self.groups,
            kv_heads=kv_heads,
            head_dim=DIM,
            device=self.query.device,
            tuning=self.tuning,
        )

    def seconds(self, gates: torch.Tensor | None = None, window: Window | None = None) -> float:
        """All layers, one launch each."""
        decoder = self._decoder(self.full.shape[1])
        plan = decoder.plan(self.counts, gates, window)

        def step() -> None:
            for layer in range(len(self.full)):
                self._attend(decoder, self.query, self.table[layer], plan, layer)

        return time_graph(step)

    def seconds_in_two(self) -> float:
        """All layers, full and local heads apart."""
        decoders = {heads: self._decoder(heads) for heads in range(1, self.full.shape[1] + 1)}
        launches: list[tuple[Any, ...]] = []
        for layer, full in enumerate(self.full):
            for heads in (full.nonzero()[:, 0], (~full).nonzero()[:, 0]):
                if len(heads):
                    decoder = decoders[len(heads)]
                    plan = decoder.plan(self.counts[layer : layer + 1, :, heads])
                    query = self.query.unflatten(1, (-1, self.groups))[:, heads].flatten(1, 2).contiguous()
                    launches.append((decoder, query, self.table[layer][:, heads].contiguous(), plan, 0))
        return time_graph(lambda: [self._attend(*launch) for launch in launches])

    def _attend(
        self, decoder: PagedDecoder, query: torch.Tensor, table: torch.Tensor, plan: DecodePlan, layer: int
    ) -> torch.Tensor:
        return decoder.attend(query, self.pool.keys, self.pool.values, table, plan, layer, DIM**-0.5)


def check(full: torch.Tensor, window: Window, groups: int, page: int, tuning: Tuning) -> dict[str, float]:
    """Errors against float32 on ragged lengths, everything that no row owns being NaN."""
    device, heads = full.device, full.shape[1]
    lengths = torch.tensor([1, 17, window.size, 700, 1025, 2999], dtype=torch.int32, device=device)
    mixed = full[(full.sum(1) - heads / 2).abs().argmin()][None]
    errors: dict[str, float] = {"hard": 0.0, "soft": 0.0, "pytorch": 0.0}
    for soft in (False, True):
        case_mask = torch.ones_like(mixed) if soft else mixed
        pool = Pool(0.2, page, device)
        case = Case(pool, lengths, case_mask, window, groups, tuning)
        owned = torch.zeros(len(pool.keys) * page, dtype=torch.bool, device=device)
        cells = {}
        for row in range(len(lengths)):
            for head in range(heads):
                count = int(case.counts[0, row, head])
                position = torch.arange(count, device=device)
                cells[row, head] = case.table[0, row, head][position // page].long() * page + position % page
                owned[cells[row, head]] = True
        for states in (pool.keys, pool.values):
            states.flatten(0, 1)[~owned] = torch.nan
        gates = torch.rand(len(lengths), 1, heads, device=device)
        gates[0], gates[-1, 0, 0], gates[-1, 0, 1] = 1, 0, 1
        decoder = case._decoder(heads)
        plan = decoder.plan(case.counts, gates, window) if soft else decoder.plan(case.counts)
        found = torch.full_like(case.query, torch.nan)
        for _ in range(2):  # the second time finds what the first left behind
            found = case._attend(decoder, case.query, case.table[0], plan, 0)
        exact, rounded = torch.zeros_like(found, dtype=torch.float32), torch.zeros_like(found)
        for (row, head), where in cells.items():
            rows = slice(head * groups, (head + 1) * groups)
            query, key, value = (
                case.query[row, rows],
                pool.keys.flatten(0, 1)[where],
                pool.values.flatten(0, 1)[where],
            )
            exact[row, rows] = F.scaled_dot_product_attention(
                *(x.double()[None] for x in (query, key, value))
            )[0]
            rounded[row, rows] = F.scaled_dot_product_attention(query[None], key[None], value[None])[0]
            if soft:
                sees = window.sees(
                    torch.tensor(len(where) - 1, device=device), torch.arange(len(where), device=device)
                )
                local = F.scaled_dot_product_attention(
                    *(x.double()[None] for x in (query, key[sees], value[sees]))
                )[0]
                exact[row, rows] = torch.lerp(local.float(), exact[row, rows], gates[row, 0, head])
        errors["soft" if soft else "hard"] = relative_error(found, exact)
        if not soft:
            errors["pytorch"] = relative_error(rounded, exact)
    limit = min(2e-2, max(1.5 * errors["pytorch"], 4e-3))
    for name in ("hard", "soft"):
        require(errors[name], limit, f"{name} decode")
    return errors


def peer_seconds(pool: Pool, batch: int, length: int, heads: int, groups: int, backend: SDPBackend) -> float:
    """One layer of PyTorch's attention over a contiguous full cache."""
    size = batch * heads * length * DIM
    keys, values = (x.flatten()[:size].view(batch, heads, length, DIM) for x in (pool.keys, pool.values))
    query = torch.randn(batch, heads * groups, 1, DIM, dtype=keys.dtype, device=keys.device)
    with sdpa_kernel(backend):
        return time_graph(lambda: F.scaled_dot_product_attention(query, keys, values, enable_gqa=True))


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
    row["two/ours"] = ours.seconds_in_two() / seconds
    whole = Case(pool, lengths, torch.ones_like(full), window, groups, tuning)
    row["full_us"] = whole.seconds() * 1e6
    row["full % copy"] = 100 * whole.bytes / row["full_us"] * 1e6 / copy
    row["time/full"] = seconds * 1e6 / row["full_us"]
    row["bytes/full"] = ours.bytes / whole.bytes
    gates = torch.rand(batch, *full.shape, device=device)
    row["soft % copy"] = 100 * whole.bytes / whole.seconds(gates, Window(128, 256)) / copy
    for name, backend in PEERS.items():
        row[f"{name}_full_us"] = float("nan")
        if not ragged and batch * length * full.shape[1] * DIM <= pool.keys.numel():
            try:
                one = peer_seconds(pool, batch, length, full.shape[1], groups, backend)
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
    parser.add_argument("--early", action="store_true", help="overlap launches (see Tuning)")
    parser.add_argument("--quick", action="store_true", help="time ours only")
    parser.add_argument("--json")
    args = parser.parse_args()
    device = need_cuda()
    torch.manual_seed(0)
    names = ("block", "programs_per_sm", "warps", "stages", "parts", "early")
    tuning = Tuning(least_blocks=args.least_blocks, **{name: getattr(args, name) for name in names})
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
