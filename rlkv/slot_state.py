"""What the decode step reads and writes for each slot, in tensors that stay in place for CUDA graphs."""

from __future__ import annotations

import torch


class SlotState:
    """One row a slot; rows of inactive slots go on being computed and are ignored."""

    def __init__(self, slots: int, max_length: int, layers: int, kv_heads: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        self.token = zeros()  # goes in next
        self.position = zeros()  # of that token
        self.count = zeros()  # tokens generated
        self.limit = zeros()  # most tokens to generate
        self.key = zeros()  # random stream
        self.active = zeros(dtype=torch.bool)
        self.gates = zeros(layers, kv_heads, dtype=torch.float32)
        self.tokens = zeros(max_length)
        self.logprobs = zeros(max_length, dtype=torch.float32)

    def admit(self, slots: torch.Tensor, start: torch.Tensor, gates: torch.Tensor | float) -> None:
        """Start requests in ``slots`` (int64 [n]) with ``gates`` [n, layers, kv_heads].

        ``start`` int64 [4, n]: last prompt token, its position, most tokens to generate, random stream.
        """
        self.token[slots], self.position[slots], self.limit[slots], self.key[slots] = start
        self.gates[slots] = gates
        self.count[slots] = 0
        self.active[slots] = True

    def record(self, rows: int, token: torch.Tensor, logprob: torch.Tensor, stop: torch.Tensor) -> None:
        """Take the next ``token`` (int64 [rows]) of the first ``rows`` slots; ``stop`` int64 [any]."""
        count, active = self.count[:rows], self.active[:rows]
        # an inactive row writes beyond its count, where nobody reads
        self.tokens[:rows].scatter_(1, count[:, None], token[:, None])
        self.logprobs[:rows].scatter_(1, count[:, None], logprob[:, None])
        self.token[:rows] = token
        self.position[:rows] += active
        count += active
        active &= (count < self.limit[:rows]) & (token[:, None] != stop).all(-1)

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy rows ``source`` to rows ``target`` (int64 [n]), read before written."""
        for tensor in vars(self).values():
            tensor[target] = tensor[source]

    def results(self, slots: list[int]) -> list[tuple[list[int], list[float]]]:
        """Tokens and log-probabilities that the requests in ``slots`` have so far."""
        where = torch.tensor(slots, dtype=torch.int64, device=self.count.device)
        counts = self.count[where].tolist()
        tokens = self.tokens[where, : max(counts)].tolist()
        logprobs = self.logprobs[where, : max(counts)].tolist()
        return [(t[:n], p[:n]) for t, p, n in zip(tokens, logprobs, counts, strict=True)]
