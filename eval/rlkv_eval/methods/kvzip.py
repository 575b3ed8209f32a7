"""KVzip's head scores: how strongly a head's cached keys are looked at while the model repeats a context.

The model is shown a context, asked to repeat it, and given the repetition (teacher forcing). A cached pair's
score is the most attention it gets from any query of the repetition, over the query heads that share it; a
head's score is that of its best pair (arXiv 2505.23416, section 3.2 and the head-level variant; the authors'
code takes the maximum over the pairs of one context, and over sources where there are several).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import DynamicCache

from rlkv.attention import NAME, Layout
from rlkv.attention.mixed import full_attention
from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv_eval.methods.base import Context
from rlkv_eval.methods.heads import HeadGenerator, masked
from rlkv_eval.methods.reconstruction import Task, contexts_of, tasks_of
from rlkv_eval.methods.scores import cached_scores, content_digest

SCORE_BYTES = 256 * 2**20  # of float32 attention weights at a time


@dataclass
class KVzip:
    """Contexts are the calibration problems joined together, or text files of your own."""

    texts: list[Path] = field(default_factory=list)  # files to repeat, one context each (none: calibration)
    contexts: int = 1  # made of the calibration problems; a head's score is its highest
    context_tokens: int = 0  # of each at most (0: what the model's context leaves, up to 16384)
    chunk: int = 2000  # tokens repeated at a time (the paper)

    name: ClassVar[str] = "kvzip"
    title: ClassVar[str] = "KVzip (heads)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.23416"

    def build(self, context: Context, sparsity: float) -> HeadGenerator:
        """Highest scores full. RLKVError without a context to repeat, or without a chat template."""
        return masked(context, self.name, self.scores(context).values, sparsity)

    def scores(self, context: Context) -> HeadGates:
        """Scores in [0, 1], cached."""
        if self.chunk < 1 or self.contexts < 1 or self.context_tokens < 0:
            raise RLKVError("kvzip: chunk and contexts must be 1 or more, context_tokens 0 or more")
        texts = contexts_of(context.calibration, self.texts, self.contexts)

        def compute(folder: Path) -> HeadGates:
            limit = self.context_tokens or 16384
            shape, best = context.shape, torch.zeros(context.shape.layers, context.shape.kv_heads)
            context.model.set_attn_implementation(NAME)
            tasks = [
                tasks_of(context.tokenizer, text, limit, self.chunk, shape.context_length) for text in texts
            ]
            tokens = sum(task.end - task.start for task in tasks)
            print(f"kvzip: {tokens} tokens to repeat (contexts: {len(tasks)})")
            for task in tasks:
                best = best.maximum(pair_scores(context.model, task).amax(-1))
            return HeadGates(best, window=context.window, model=shape)

        return cached_scores(context, self, compute, texts=content_digest(texts))


@torch.inference_mode()
def pair_scores(model: Any, task: Task) -> torch.Tensor:
    """float32 [layers, kv_heads, context tokens] on the CPU: the score of every cached pair of the context.

    One forward fills the cache with the context, one for each chunk repeats it and is taken out again. The
    attention is normalised over the sink, the chunk and the repetition, as the authors do.
    """
    device = model.device
    cache = DynamicCache(config=model.config)
    prompt = torch.tensor([task.prompt], device=device)
    model.base_model(prompt, past_key_values=cache, use_cache=True)
    found = []
    for start, stop, repetition in task.chunks:
        looks = Looks(sink=task.start, start=start, stop=stop)
        ids = torch.tensor([repetition], device=device)
        model.base_model(ids, past_key_values=cache, use_cache=True, rlkv=looks)
        cache.crop(-len(repetition))
        found.append(torch.stack([looks.scores[layer] for layer in sorted(looks.scores)]))
    return torch.cat(found, dim=-1).cpu()


class Looks:
    """Full attention that notes how strongly keys ``start`` … ``stop`` - 1 are looked at by new queries."""

    def __init__(self, sink: int, start: int, stop: int) -> None:
        self.sink, self.start, self.stop = sink, start, stop
        self.scores: dict[int, torch.Tensor] = {}  # layer -> [kv_heads, stop - start]

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: Layout,
        scaling: float,
    ) -> torch.Tensor:
        """query [1, Hq, Tq, D]; key, value [1, Hkv, Tk, D] -> [1, Hq, Tq, D]."""
        self.scores[module.layer_idx] = self.strongest(query[0], key[0], scaling)
        return full_attention(query, key, value, layout, scaling)

    def strongest(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
        """query [Hq, Tq, D], key [Hkv, Tk, D], the last Tq keys being the queries' own -> [Hkv, context]."""
        heads, new = key.shape[0], query.shape[1]
        keys = torch.cat([key[:, : self.sink], key[:, self.start : self.stop], key[:, -new:]], dim=1).float()
        old = keys.shape[1] - new
        queries = query.unflatten(0, (heads, -1)).float()  # [Hkv, group, Tq, D]
        place = torch.arange(keys.shape[1], device=key.device)
        best = keys.new_zeros(heads, self.stop - self.start)
        block = max(1, SCORE_BYTES // (4 * query.shape[0] * keys.shape[1]))
        for first in range(0, new, block):
            part = queries[:, :, first : first + block]
            weights = part @ keys[:, None].transpose(-1, -2) * scaling
            now = torch.arange(first, first + part.shape[2], device=key.device)
            weights = weights.masked_fill(place > old + now[:, None], -math.inf).softmax(-1)
            best = best.maximum(weights[..., self.sink : old].amax(dim=(1, 2)))
        return best
