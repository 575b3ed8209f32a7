"""A cache whose heads hold different tokens: each cell has its token's true position, and is used again.

Slots are independent rows. Of a layer, every KV head holds the same number of tokens of a request, in its
first cells and in any order, but not the same tokens. Keys keep the rotation of their true positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from rlkv.support import ModelShape
from rlkv_eval.methods.eviction.ledger import Ledger
from rlkv_eval.methods.eviction.passes import Handle, PromptPass, StepPass
from rlkv_eval.methods.eviction.plan import Table
from rlkv_eval.methods.eviction.policy import Policy, View


class EvictingCache(Cache):
    """Tables by layer; ``prompt`` or ``step`` says what the next forward is. S slots, H KV heads, C cells.

    keys [S, H, D, C]; values [S, H, C, D]; positions int32 and score float32 [S, H, C].
    """

    def __init__(
        self,
        shape: ModelShape,
        policy: Policy,
        ledger: Ledger,
        *,
        cells: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(layers=[])
        self.policy, self.ledger, self.cells, self.device = policy, ledger, cells, device
        slots, heads, dim = len(ledger.length), shape.kv_heads, shape.head_dim
        zeros = partial(torch.zeros, device=device)
        each = range(shape.layers)
        self.keys = [zeros(slots, heads, dim, cells, dtype=dtype) for _ in each]
        self.values = [zeros(slots, heads, cells, dim, dtype=dtype) for _ in each]
        self.positions = [zeros(slots, heads, cells, dtype=torch.int32) for _ in each]
        self.score = [zeros(slots, heads, cells, dtype=torch.float32) for _ in each]
        self.stream = zeros(slots, dtype=torch.int64)
        self._pass: PromptPass | StepPass | None = None

    def prompt(self, slots: torch.Tensor, lengths: torch.Tensor) -> None:
        """The next forward is right-padded prompts without their last tokens; ``lengths`` with them."""
        self._pass = PromptPass(self, slots, lengths)

    def step(self, spans: Sequence[tuple[int, int]], round_cells: int) -> None:
        """The next forward is one token a slot, where the ledger says; slots of a span attend together."""
        self._pass = StepPass(self, spans, round_cells)

    def view(self, layer: int, rows: slice | torch.Tensor, cells: int, numbers: torch.Tensor) -> View:
        """Some slots of a layer; ``numbers`` int64 [4, n, 1, 1]: held, length, prompt, budget."""
        held, length, prompt, budget = numbers
        tables = (self.keys[layer], self.positions[layer], self.score[layer])
        keys, positions, score = (table[..., :cells][rows] for table in tables)
        stream = self.stream[rows].view(-1, 1, 1)
        return View(layer, keys, positions, score, held, length, prompt, budget, stream)

    def cut(self, slots: Table, kept: Table) -> None:
        """Keep the ``kept`` tokens of highest priority in each of ``slots``, in the order of their cells."""
        ledger = self.ledger
        cells, most = int(ledger.held[slots].max()), int(kept.max())
        if most:
            length = ledger.length[slots]
            numbers = (
                ledger.held[slots],
                length,
                ledger.prompt[slots],
                ledger.plan.held[length],
                slots,
                kept,
            )
            sent = self.send(np.stack(numbers))
            rows, room = sent[4], sent[5].view(-1, 1, 1)
            for layer in range(len(self.keys)):
                view = self.view(layer, rows, cells, sent[:4, :, None, None])
                priority = self.policy.priority(view).masked_fill(view.empty, -torch.inf)
                best = priority.topk(most, dim=-1).indices
                surplus = torch.arange(most, device=self.device) >= room
                best = best.masked_fill(surplus, cells).sort(-1).values.clamp(max=cells - 1)
                self._gather(layer, rows, view, best)
        ledger.cut(slots, kept)

    def _gather(self, layer: int, rows: torch.Tensor, view: View, best: torch.Tensor) -> None:
        """Move cells ``best`` int64 [n, H, kept] to the front."""
        count = best.shape[-1]
        keys, values = self.keys[layer], self.values[layer]
        dim = keys.shape[2]
        keys[rows, :, :, :count] = view.keys.gather(3, best[:, :, None].expand(-1, -1, dim, -1))
        old = values[rows, :, : view.positions.shape[-1]]
        values[rows, :, :count] = old.gather(2, best[..., None].expand(-1, -1, -1, dim))
        self.positions[layer][rows, :, :count] = view.positions.gather(2, best)
        self.score[layer][rows, :, :count] = view.score.gather(2, best)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """(from, to): rows change places; reads come first."""
        cells = int(self.ledger.held.max())
        source, target = self.send(np.array(moves).T.copy())
        for table in (*self.keys, *self.positions, *self.score):
            table[target, ..., :cells] = table[source, ..., :cells]
        for values in self.values:
            values[target, :, :cells] = values[source, :, :cells]
        self.stream[target] = self.stream[source]
        self.ledger.move(moves)

    def send(self, numbers: Table) -> torch.Tensor:
        """To the device, without waiting for it."""
        tensor = torch.from_numpy(numbers)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """key_states, value_states [n, H, T, D] -> the handle that stores them and attends, twice."""
        assert self._pass is not None
        handle = Handle(partial(self._pass.attend, layer_idx, key_states, value_states))
        return handle, handle

    # transformers sizes its mask by these; positions are given explicitly and the handle masks by itself
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return self.cells, 0
