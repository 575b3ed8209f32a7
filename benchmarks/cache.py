"""Decode speed and KV bytes of HeadwiseCache beside transformers' own cache, on a random Llama.

    python benchmarks/cache.py                                        # two CPU cores: about two minutes
    python benchmarks/cache.py --device cuda --size 8b --batch 1 16 --length 4096 16384 --json cache.json

Contenders take turns in one process, and every figure is the median of the rounds; compare the ratios, not
the tokens/s of different machines. "transformers" is DynamicCache with SDPA attention. ``--ragged`` draws
prompt lengths between a quarter of --length and --length. On a busy machine set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from dataclasses import asdict, dataclass

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache

from rlkv.attention import enable
from rlkv.cache import HeadwiseCache
from rlkv.mask import HeadMask
from rlkv.window import Window

SIZES = {  # layers, width, query heads, KV heads, MLP width
    "tiny": (4, 256, 8, 4, 512),
    "small": (4, 1024, 16, 8, 2048),
    "8b": (32, 4096, 32, 8, 14336),
}


@dataclass
class Row:
    """One contender at one batch and length."""

    batch: int
    length: int
    cache: str
    sparsity: float
    prefill_seconds: float
    tokens_per_second: float  # of decoding, over the whole batch
    kv_bytes: int
    prefill_peak_bytes: int | None  # above the weights, CUDA only
    speed_ratio: float = 1.0  # to transformers' cache
    bytes_ratio: float = 1.0


def storage_bytes(cache: Cache) -> int:
    if isinstance(cache, HeadwiseCache):
        return cache.nbytes()
    states = [getattr(layer, part) for layer in cache.layers for part in ("keys", "values")]
    return sum(tensor.untyped_storage().nbytes() for tensor in states)


@torch.inference_mode()
def run(
    model: LlamaForCausalLM, cache: Cache, mask: torch.Tensor, tokens: int
) -> tuple[float, float, int | None]:
    """(seconds of the prompt, seconds of one decoding step, peak bytes of the prompt)."""
    cuda = mask.device.type == "cuda"

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    padded = None if mask.all() else mask
    token = torch.ones_like(mask)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    start = now()
    for _ in range(2):  # the second time tokens is one
        options = {} if padded is None else {"attention_mask": padded, "position_ids": position}
        logits = model(token, past_key_values=cache, logits_to_keep=1, **options).logits
        if token.shape[1] > 1:
            prompt = now()
            peak = torch.cuda.max_memory_allocated() - before if cuda else None
        token, position = logits.argmax(-1), position[:, -1:] + 1
        padded = None if padded is None else torch.cat([padded, padded[:, -1:]], 1)
    warm = now()
    for _ in range(tokens):
        options = {} if padded is None else {"attention_mask": padded, "position_ids": position}
        token = model(token, past_key_values=cache, **options).logits.argmax(-1)
        position = position + 1
        padded = None if padded is None else torch.cat([padded, padded[:, -1:]], 1)
    return prompt - start, (now() - warm) / tokens, peak


def measure(model: LlamaForCausalLM, batch: int, length: int, args: argparse.Namespace) -> list[Row]:
    """All contenders at one batch and length."""
    config, window = model.config, Window.parse(args.window)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(length // 4, length + 1, (batch,), generator=generator) if args.ragged else None
    mask = torch.ones(batch, length, dtype=torch.long, device=args.device)
    if lengths is not None:
        lengths[0] = length
        mask = (torch.arange(length) >= length - lengths[:, None]).long().to(args.device)
    contenders: list[float | None] = [None, *args.sparsity]
    results: dict[float | None, list[tuple[float, float, int | None]]] = {one: [] for one in contenders}
    held: dict[float | None, int] = {}
    for _ in range(args.rounds):
        for sparsity in contenders:
            if sparsity is None:
                model.set_attn_implementation("sdpa")
                cache: Cache = DynamicCache(config=config)
            else:
                shape = enable(model)
                heads = HeadMask.random(shape.layers, shape.kv_heads, sparsity)
                cache = HeadwiseCache(config, heads, window, prefill=args.prefill)
            results[sparsity].append(run(model, cache, mask, args.tokens))
            held[sparsity] = storage_bytes(cache)
            del cache
            gc.collect()
    rows = []
    for sparsity in contenders:
        prompt = statistics.median(result[0] for result in results[sparsity])
        step = statistics.median(result[1] for result in results[sparsity])
        peaks = [result[2] for result in results[sparsity] if result[2] is not None]
        name = "transformers" if sparsity is None else "headwise"
        peak = max(peaks) if peaks else None
        rows.append(Row(batch, length, name, sparsity or 0.0, prompt, batch / step, held[sparsity], peak))
    for row in rows:
        row.speed_ratio = row.tokens_per_second / rows[0].tokens_per_second
        row.bytes_ratio = row.kv_bytes / rows[0].kv_bytes
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, help="default: float32 on CPU, bfloat16 on CUDA")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--length", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--tokens", type=int, default=32, help="decoding steps timed")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--window", default="16+64")
    parser.add_argument("--prefill", default="full", choices=("full", "local"))
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args()
    layers, width, heads, kv_heads, mlp = SIZES[args.size]
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32"))
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2 * max(args.length),
    )
    with torch.device(args.device):
        model = LlamaForCausalLM(config).to(dtype).eval()
    device = (
        torch.cuda.get_device_name()
        if args.device.startswith("cuda")
        else f"{torch.get_num_threads()} threads"
    )
    shape = "ragged" if args.ragged else "even"
    print(f"random Llama {args.size}, {dtype}, {device}, window {args.window}, {shape}")
    print("batch length        cache    s  prompt s  tokens/s  ratio   KV MiB  ratio  peak MiB")
    rows = []
    for batch in args.batch:
        for length in args.length:
            for row in measure(model, batch, length, args):
                rows.append(row)
                peak = "-" if row.prefill_peak_bytes is None else f"{row.prefill_peak_bytes / 2**20:.0f}"
                print(
                    f"{batch:5} {length:6} {row.cache:>12} {row.sparsity:4.2f} {row.prefill_seconds:9.2f} "
                    f"{row.tokens_per_second:9.1f} {row.speed_ratio:6.2f} {row.kv_bytes / 2**20:8.1f} "
                    f"{row.bytes_ratio:6.2f} {peak:>9}",
                    flush=True,
                )
    if args.json:
        record = {"arguments": vars(args), "device": device, "torch": torch.__version__}
        with open(args.json, "w") as file:
            json.dump(record | {"rows": [asdict(row) for row in rows]}, file, indent=1)


if __name__ == "__main__":
    main()
