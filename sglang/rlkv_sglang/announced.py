"""What both of our backends know of a batch and SGLang's own don't: each request's slot and prompt."""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from rlkv.errors import RLKVError
from rlkv.serving.extend import Chunk


class Announced(AttentionBackend):
    """Mixed in before a class of SGLang; the batch of requests tells what the next forward holds."""

    _expected: list[Chunk]

    def expect(self, chunks: list[Chunk]) -> None:
        """What the next forward with several tokens a request holds, from SGLang's batch of requests."""
        self._expected = chunks

    def announced(self, forward_batch: Any) -> list[Chunk]:
        """The chunks of a forward; RLKVError if they are not the ones that it has."""
        if not forward_batch.rids:  # a warm-up's batch belongs to no request: padding
            lengths = zip(
                forward_batch.extend_prefix_lens.tolist(), forward_batch.extend_seq_lens.tolist(), strict=True
            )
            return [Chunk(None, 0, start, start + count) for start, count in lengths]
        starts, counts = forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu
        actual = list(zip(forward_batch.rids, starts, counts, strict=True))
        expected = getattr(self, "_expected", [])
        if actual != [(chunk.request, chunk.start, chunk.stop - chunk.start) for chunk in expected]:
            raise RLKVError("attention backend rlkv: SGLang runs another batch than the one it announced")
        return expected


def teach(backend: Any, kind: type[Announced]) -> Any:
    """Make an object of one of SGLang's backends one of ``kind`` too, whatever else it is."""
    own = type(backend)
    backend.__class__ = type(f"{kind.__name__}{own.__name__}", (kind, own), {})
    return backend
