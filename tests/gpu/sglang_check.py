"""SGLang with a head mask on a GPU, CUDA graphs and all, against the head-wise cache in float32.

A small random Llama with heads of 128 is served in bfloat16, with prompts in chunks and forced retraction;
every token that it wrote is judged by the logits that the float32 model gives, with the same mask, after the
same tokens. Rounding alone changes some: how many, and what a wrong mask does, is said by

    python tests/gpu/sglang_check.py rounding      # transformers in bfloat16, also without a GPU
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rlkv.window import Window

WINDOW = Window(16, 65)
LENGTHS = (5, 81, 82, 200, 255, 256, 257, 390, 511, 700)
NEW = 96
SHAPE = {"layers": 4, "kv_heads": 8}


def make_model(folder: Path) -> None:
    """A Llama whose logits differ by far more than bfloat16 rounds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=16,
        num_key_value_heads=SHAPE["kv_heads"],
        head_dim=128,
        max_position_embeddings=2048,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(512) for _ in range(length)] for length in LENGTHS]


def random_mask(folder: Path, sparsity: float, seed: int) -> Any:
    from rlkv.loading import load_shape
    from rlkv.mask import HeadMask

    shape = load_shape(str(folder))
    return HeadMask.random(shape.layers, shape.kv_heads, sparsity, seed, window=WINDOW, model=shape)


def serve(folder: Path, mask: Any, prefill: str, backend: str) -> list[list[int]]:
    """Greedy tokens, with chunked prefill and a pool too small for all requests."""
    mask.save(folder / "mask.json")
    os.environ |= {
        "RLKV_MASK": str(folder / "mask.json"),
        "RLKV_PREFILL": prefill,
        "RLKV_BACKEND": backend,
        "SGLANG_TEST_RETRACT": "1",  # SGLang's own way to force retraction, every so many steps
        "SGLANG_TEST_RETRACT_INTERVAL": "20",
    }
    import sglang

    engine = sglang.Engine(
        model_path=str(folder),
        attention_backend="rlkv",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        sampling_backend="pytorch",
        grammar_backend="none",
        mem_fraction_static=0.9,
        context_length=2048,
        chunked_prefill_size=256,
        max_total_tokens=2600,
        max_running_requests=12,
        cuda_graph_bs_decode=[1, 4, 8, 12],
        log_level="info",
        random_seed=0,
    )
    sampling = {"temperature": 0.0, "max_new_tokens": NEW, "ignore_eos": True}
    answers = engine.generate(input_ids=prompts(), sampling_params=sampling)
    engine.shutdown()
    return [answer["output_ids"] for answer in answers]


def steps(
    folder: Path, mask: Any, prefill: str, dtype: torch.dtype, written: torch.Tensor | None = None
) -> Iterator[torch.Tensor]:
    """Logits [prompts, vocabulary] of each step of transformers, after ``written`` or its own choices."""
    from transformers import AutoModelForCausalLM

    from rlkv.attention import NAME
    from rlkv.cache import HeadwiseCache

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    model.set_attn_implementation(NAME)
    rows, longest = prompts(), max(LENGTHS)
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    padding = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    cache = HeadwiseCache(model.config, mask, window=WINDOW, prefill=prefill)
    for step in range(NEW):
        positions = (padding.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(ids, attention_mask=padding, position_ids=positions, past_key_values=cache)
        yield (logits := output.logits[:, -1])
        ids = logits.argmax(-1, keepdim=True) if written is None else written[:, step : step + 1].to(device)
        padding = torch.cat([padding, torch.ones_like(ids)], 1)


@torch.inference_mode()
def judge(folder: Path, mask: Any, prefill: str, tokens: list[list[int]]) -> dict[str, float]:
    """How often the engine's token is the reference's, and by how much its logit falls short, at most."""
    same, short, written = [], [], torch.tensor(tokens)
    for step, logits in enumerate(steps(folder, mask, prefill, torch.float32, written)):
        logits = logits.cpu()
        chosen = logits.gather(1, written[:, step : step + 1])[:, 0]
        same.append(logits.argmax(-1) == written[:, step])
        short.append((logits.max(-1).values - chosen) / logits.std(-1))
    return {
        "same": torch.stack(same).float().mean().item(),
        "shortfall_in_std": torch.stack(short).max().item(),
    }


@torch.inference_mode()
def rounding() -> dict[str, dict[str, float]]:
    """What transformers' own greedy tokens in bfloat16 are judged, with the mask and with wrong ones."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        mask = random_mask(folder, 0.5, 3)
        others = {"another mask": random_mask(folder, 0.5, 4), "full heads": random_mask(folder, 0.0, 3)}
        for what, one in {"the mask": mask, **others}.items():
            tokens = [logits.argmax(-1) for logits in steps(folder, one, "full", torch.bfloat16)]
            found[what] = judge(folder, mask, "full", torch.stack(tokens, 1).tolist())
    return found


def main(prefill: str, backend: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        mask = random_mask(folder, 0.5, 3)
        return judge(folder, mask, prefill, serve(folder, mask, prefill, backend))


if __name__ == "__main__":
    print(json.dumps(rounding() if sys.argv[1:] == ["rounding"] else main(*sys.argv[1:])))
