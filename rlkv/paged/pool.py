"""Which pages are free, and how many owners the others have: plain bookkeeping on the host."""

from __future__ import annotations

import numpy as np
import torch

from rlkv.errors import RLKVError
from rlkv.support import ModelShape

TRASH = 0  # nobody's page: what is to be stored nowhere goes there


class PagePool:
    """Pages numbered from 1 to ``pages - 1``; page 0 is never given away."""

    def __init__(self, pages: int) -> None:
        if pages < 2:
            raise RLKVError(f"page pool: {pages} pages hold nothing; give it more memory")
        self.owners = np.zeros(pages, dtype=np.int32)
        self._stack = np.arange(pages - 1, 0, -1, dtype=np.int32)
        self.free = pages - 1
        self.most_used = 0

    @property
    def used(self) -> int:
        return len(self._stack) - self.free

    def clear(self) -> None:
        """Every page is free again, whoever held it."""
        self.owners[:] = 0
        self.free = len(self._stack)
        self._stack[:] = np.arange(self.free, 0, -1, dtype=np.int32)

    def take(self, number: int) -> np.ndarray:
        """``number`` free pages (int32), each with one owner. Raises RLKVError when there are fewer."""
        if number > self.free:
            raise RLKVError(f"page pool: {number} pages asked for, {self.free} are free")
        self.free -= number
        pages = self._stack[self.free : self.free + number].copy()
        self.owners[pages] = 1
        self.most_used = max(self.most_used, self.used)
        return pages

    def share(self, pages: np.ndarray) -> None:
        """One more owner for each of these (distinct) pages."""
        self.owners[pages] += 1

    def release(self, pages: np.ndarray) -> None:
        """One owner fewer for each of these (distinct) pages; pages without an owner are free."""
        self.owners[pages] -= 1
        gone = pages[self.owners[pages] == 0]
        self._stack[self.free : self.free + len(gone)] = gone
        self.free += len(gone)


def pages_in(memory: int, shape: ModelShape, page_size: int, dtype: torch.dtype) -> int:
    """Pages (of keys and values) that ``memory`` bytes hold. Raises RLKVError for none."""
    page = 2 * page_size * shape.head_dim * dtype.itemsize
    if memory < 2 * page:
        raise RLKVError(f"sampler: kv_bytes={memory} hold no page; one takes {page} bytes")
    return memory // page
