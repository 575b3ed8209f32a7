"""Random request traces through rings and staging, watched by a slow model that knows no layout.

Every token has a fingerprint as its value, and with a query of zeros attention is the mean of what it reads:
an output tells exactly which tokens were read. Writes are found by comparing the pool before and after.
Memory of requests that ended is filled with NaN.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
import torch

from rlkv.errors import RLKVError
from rlkv.serving.decode import decode_local
from rlkv.serving.extend import Causal, Chunk, Extend
from rlkv.serving.slots import Slots, Staging
from rlkv.window import Window

DIM = 3


class Ledger:
    """Who owns which row, from what is seen to be written; what a token should have read, by definition."""

    def __init__(self, window: Window, full: bool) -> None:
        self.window, self.full = window, full
        self.owner: dict[int, int] = {}
        self.tokens: dict[tuple[float, ...], tuple[int, int]] = {}

    def fingerprint(self, request: int, position: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(request * 1000 + position)
        value = torch.rand(DIM, dtype=torch.float64, generator=generator)
        self.tokens[tuple(value.tolist())] = (request, position)
        return value

    def expected(self, request: int, position: int, prompt: int) -> torch.Tensor:
        seen = [
            j
            for j in range(position + 1)
            if (self.full and position < prompt) or j < self.window.sink or position - j < self.window.recent
        ]
        return torch.stack([self.fingerprint(request, j) for j in seen]).mean(0)

    def written(self, before: torch.Tensor, after: torch.Tensor, writers: set[int], live: set[int]) -> None:
        for row in range(len(after)):
            value = tuple(after[row, 0].tolist())
            if value == tuple(before[row, 0].tolist()) or value not in self.tokens:
                continue  # unchanged, or a padding row's zeros
            request, _ = self.tokens[value]
            assert request in writers, f"row {row} got a token of a request that is not running"
            other = self.owner.get(row)
            assert other in (None, request) or other not in live, f"row {row} has two owners"
            self.owner[row] = request

    def ended(self, request: int, above: int = 0) -> list[int]:
        """Rows from ``above`` on that the request no longer owns."""
        rows = [row for row, owner in self.owner.items() if owner == request and row >= above]
        for row in rows:
            del self.owner[row]
        return rows


@dataclass
class Request:
    index: int
    prompt: int
    new: int
    arrival: int
    aborted: int  # at this step; a large number: never
    written: int = 0  # tokens decoded so far
    stored: int = 0  # tokens in memory
    slot: int | None = None
    done: bool = False
    again: bool = False  # was retracted

    @property
    def length(self) -> int:
        """Tokens to be in memory before it decodes."""
        return self.prompt + self.written


class Engine:
    """A scheduler in small: continuous batching, chunked prefill, retraction, aborts, one overlapped step."""

    slots_kind: type[Slots] = Slots
    extend_kind: type[Extend] = Extend

    def __init__(self, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        window = Window(draw.randrange(4), draw.randrange(1, 7))
        self.full = draw.random() < 0.6
        self.places = draw.randrange(1, 4)
        self.chunk = draw.randrange(3, 14)
        self.requests = [
            Request(
                i,
                prompt=draw.randrange(1, 25),
                new=draw.randrange(1, 9),
                arrival=draw.randrange(12),
                aborted=draw.choice([draw.randrange(1, 30), 999, 999]),
            )
            for i in range(draw.randrange(2, 7))
        ]
        staging = max(r.prompt for r in self.requests) if self.full else 0
        self.slots = self.slots_kind(window, self.places, staging)
        self.staging = Staging(staging)
        self.free = list(range(1, self.places + 1))
        self.pool = torch.full((self.slots.rows, 1, DIM), torch.nan, dtype=torch.float64)
        self.pool[: window.size] = 0  # the padding ring
        self.ledger = Ledger(window, self.full)

    def run(self) -> None:
        """Until all requests are done; AssertionError or RLKVError on the first thing that is wrong."""
        for step in range(400):
            for request in self.requests:
                if not request.done and step >= request.aborted:
                    self.end(request)
            waiting = [r for r in self.requests if not r.done and r.arrival <= step and r.stored < r.length]
            if all(r.done for r in self.requests):
                break
            running = [r for r in self.requests if r.slot is not None and r.stored == r.length]
            if running and self.draw.random() < 0.1:
                self.retract(self.draw.choice(running))
            elif not self.prefill(waiting) and running:
                self.decode(running)
        assert all(r.done for r in self.requests), "requests are stuck"
        assert sorted(self.free) == list(range(1, self.places + 1)), "a request slot leaked"
        assert not self.ledger.owner, "a row leaked"

    def prefill(self, waiting: list[Request]) -> bool:
        """As many waiting requests as the chunk holds; only the last may be cut, and goes on first."""
        chunks, budget = [], self.chunk
        for request in sorted(waiting, key=lambda r: (r.slot is None, r.arrival, r.index)):
            if budget == 0 or (request.slot is None and not self.free):
                break
            if request.slot is None:
                request.slot = self.free.pop(0)
            stop = min(request.length, request.stored + budget)
            budget -= stop - request.stored
            chunks.append(Chunk(request.index, request.slot, request.stored, stop, self.exempt(request)))
        if not chunks:
            return False
        value = self.values((c.request, p) for c in chunks for p in range(c.start, c.stop))
        extend = self.extend_kind(self.slots, self.staging, chunks, "cpu")
        output, before = torch.full_like(value, torch.nan), self.pool.clone()
        keys = torch.zeros_like(self.pool)
        extend.attend(torch.zeros_like(value), torch.zeros_like(value), value, keys, self.pool, 1.0, output)
        rings = (self.places + 1) * (self.slots.window.sink + self.slots.window.recent)
        given_up: list[int] = []  # a complete prompt needs nothing outside its ring any more
        for chunk in chunks:
            request = self.requests[chunk.request]  # type: ignore[call-overload]
            request.stored = chunk.stop
            if chunk.stop >= request.prompt:
                given_up += self.ledger.ended(request.index, above=rings)
        self.check(before, output, [(c.request, p) for c in chunks for p in range(c.start, c.stop)])
        self.pool[[row for row in given_up if row not in self.ledger.owner]] = torch.nan
        return True

    def exempt(self, request: Request) -> int:
        return request.prompt if self.full else 0

    def decode(self, running: list[Request]) -> None:
        """One token of each, with some padding rows as a CUDA graph has them."""
        padding = self.draw.randrange(3)
        slot = torch.tensor([r.slot for r in running] + [0] * padding)
        position = torch.tensor([r.stored for r in running] + [0] * padding)
        value = self.values((r.index, r.stored) for r in running)
        value = torch.cat([value, value.new_zeros(padding, 1, DIM)])
        before = self.pool.clone()
        self.pool[self.slots.ring(slot, position)] = value
        rows, filled = self.slots.held(slot, position + 1)
        output = decode_local(
            torch.zeros_like(value), torch.zeros_like(self.pool), self.pool, rows, filled, 1.0
        )
        self.check(before, output[: len(running)], [(r.index, r.stored) for r in running])
        for request in running:
            request.stored += 1
            request.written += 1
            if request.written == request.new:
                self.overlapped(request)
                self.end(request)

    def overlapped(self, request: Request) -> None:
        """The step that was under way when a request finished writes once more; nobody reads the result."""
        if self.draw.random() < 0.5:
            assert request.slot is not None
            row = self.slots.ring(torch.tensor(request.slot), torch.tensor(request.stored))
            before = self.pool.clone()
            self.pool[row] = self.ledger.fingerprint(request.index, request.stored)
            self.ledger.written(before, self.pool, {request.index}, self.live())

    def retract(self, request: Request) -> None:
        """Back into the queue: what it has written becomes part of what is processed again."""
        request.again = True
        self.give_back(request)
        request.stored = 0

    def end(self, request: Request) -> None:
        request.done = True
        if request.slot is not None:
            self.give_back(request)

    def give_back(self, request: Request) -> None:
        assert request.slot is not None
        self.free.append(request.slot)
        request.slot = None
        self.pool[self.ledger.ended(request.index)] = torch.nan

    def live(self) -> set[int]:
        return {r.index for r in self.requests if r.slot is not None}

    def values(self, tokens: Iterable[tuple[object, int]]) -> torch.Tensor:
        return torch.stack([self.ledger.fingerprint(r, p)[None] for r, p in tokens])  # type: ignore[arg-type]

    def check(self, before: torch.Tensor, output: torch.Tensor, tokens: list[tuple[object, int]]) -> None:
        self.ledger.written(before, self.pool, {r for r, _ in tokens}, self.live())  # type: ignore[misc]
        for got, (request, position) in zip(output, tokens, strict=True):
            prompt = self.requests[request].prompt  # type: ignore[call-overload]
            wanted = self.ledger.expected(request, position, prompt)  # type: ignore[arg-type]
            assert torch.allclose(got[0], wanted, atol=1e-9), f"token {position} of {request} read others"


@pytest.mark.parametrize("part", range(4))
def test_traces_read_and_write_only_their_own(part: int) -> None:
    for seed in range(250):
        Engine(1000 * part + seed).run()


@dataclass(frozen=True)
class ShiftedRing(Slots):
    def ring(self, request: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return super().ring(request, position + (position >= self.window.sink + 2))


@dataclass(frozen=True)
class HeldTooMany(Slots):
    def held(self, request: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().held(request, length + 1)


@dataclass(frozen=True)
class PaddingHasNoRing(Slots):
    def ring(self, request: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return super().ring(request.clamp(min=1), position)


@dataclass(frozen=True)
class StagingOverlaps(Slots):
    @property
    def staging_start(self) -> int:
        return self.requests * self.window.size

    @property
    def rows(self) -> int:
        return super().rows + self.window.size


class StoresFirst(Extend):
    """The released fork's order: a chunk overwrites the window that its own first tokens see."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        output: torch.Tensor,
        causal: Causal | None = None,
    ) -> None:
        self.store(key, value, keys, values)
        super().attend(query, key, value, keys, values, scaling, output, causal)


class RepeatsAttendFully(Engine):
    def exempt(self, request: Request) -> int:
        return request.length if self.full else 0


class FreesTwice(Engine):
    def retract(self, request: Request) -> None:
        assert request.slot is not None
        self.free.append(request.slot)
        super().retract(request)


class ForgetsAborted(Engine):
    def end(self, request: Request) -> None:
        aborted = request.written < request.new
        if aborted and request.slot is not None:
            request.done, request.slot = True, None
        else:
            super().end(request)


@dataclass
class Bug:
    name: str
    engine: type[Engine] = Engine
    parts: dict[str, type] = field(default_factory=dict)


@pytest.mark.parametrize(
    "bug",
    [
        Bug("ring off by one", parts={"slots_kind": ShiftedRing}),
        Bug("reads a slot too many", parts={"slots_kind": HeldTooMany}),
        Bug("padding rows write to a request", parts={"slots_kind": PaddingHasNoRing}),
        Bug("staging overlaps a ring", parts={"slots_kind": StagingOverlaps}),
        Bug("stores before it reads", parts={"extend_kind": StoresFirst}),
        Bug("repeated tokens attend fully", RepeatsAttendFully),
        Bug("a slot is given back twice", FreesTwice),
        Bug("an aborted request keeps its slot", ForgetsAborted),
    ],
    ids=lambda bug: bug.name,
)
def test_bugs_are_caught(bug: Bug) -> None:
    broken = type("Broken", (bug.engine,), bug.parts)
    caught = 0
    for seed in range(120):
        try:
            broken(seed).run()
        except (AssertionError, RLKVError, IndexError):
            caught += 1
    assert caught > 3, f"{bug.name}: {caught} of 120 traces noticed"
