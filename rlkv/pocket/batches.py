"""Training rows of the pocket reasoner: tokens padded to their task's width, with the completion labelled."""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from rlkv.pocket.tasks import REASONING, examples
from rlkv.pocket.tokenizer import VOCABULARY, encode

WIDTHS = {"resolve": 480, "search": 656, "ledger": 448, "recall": 240}  # tokens: no longer example exists
EOS = VOCABULARY["<eos>"]


def draw(
    task: str, count: int, seed: int, no_thought: float, split: str = "train"
) -> tuple[np.ndarray, np.ndarray]:
    """``count`` examples as tokens uint8 [count, width] and completion starts int16 [count]."""
    rng, source = random.Random(seed), examples(task, split, seed)
    tokens = np.full((count, WIDTHS[task]), VOCABULARY["<pad>"], dtype=np.uint8)
    starts = np.zeros(count, dtype=np.int16)
    for row in range(count):
        example = next(source)
        prompt, thought = f"<bos><user>{example.prompt}<assistant><think>", f"{example.thought}</think>"
        if task in REASONING and rng.random() < no_thought:
            prompt, thought = prompt + "</think>", ""
        head = encode(prompt)
        ids = head + encode(f"{thought}\\boxed{{{example.answer}}}<eos>")
        tokens[row, : len(ids)], starts[row] = ids, len(head)
    return tokens, starts


def label(ids: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token labels of the completion: position t is labelled with token t + 1."""
    labels = ids.roll(-1, dims=1)
    place = torch.arange(ids.shape[1], device=ids.device)
    outside = (place < starts[:, None] - 1) | (labels == VOCABULARY["<pad>"]) | (place == ids.shape[1] - 1)
    return ids, labels.masked_fill(outside, -100)


class Pool:
    """Pre-drawn examples of one task on the device; hands out random batches."""

    def __init__(
        self,
        task: str,
        count: int,
        executor: ProcessPoolExecutor,
        *,
        workers: int,
        seed: int,
        no_thought: float,
        device: str,
    ) -> None:
        share = -(-count // workers)
        jobs = [
            executor.submit(draw, task, share, seed * 10_000 + worker, no_thought)
            for worker in range(workers)
        ]
        parts = [job.result() for job in jobs]
        self.tokens = torch.from_numpy(np.concatenate([part[0] for part in parts])).to(device)
        self.starts = torch.from_numpy(np.concatenate([part[1] for part in parts])).to(device)

    def batch(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Input ids [rows, width] and next-token labels, -100 outside the completion."""
        picked = torch.randint(len(self.tokens), (rows,), device=self.tokens.device)
        return label(self.tokens[picked].long(), self.starts[picked])
