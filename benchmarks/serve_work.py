"""What one engine is asked to do, and what is measured of it: the works of benchmarks/serve_sglang.py.

`bound`: memory-bound long answers in their steady state. Short prompts, long answers, more requests than fit;
it begins with requests under way (a longer prompt, a shorter rest: lengths as a running server has them), so
that no minutes are spent on filling up and no arm gains by where a wave ends; tokens are counted for a while.
`ample`: a batch that fits. `alone`: one request. `load`: Poisson arrivals, latencies as a client sees them.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

GREEDY = {"temperature": 0.0, "ignore_eos": True}
KRONECKER = (0.8191725134, 0.6710436067, 0.5497004779)  # even spread in three dimensions
COARSE = 50  # tokens between two reports of a request where only sums count
FILL, SETTLE = 25.0, 4.0  # seconds


@dataclass(frozen=True)
class Work:
    """Lengths in tokens, from-to or one number."""

    kind: Literal["steady", "batch", "alone", "poisson"]
    prompt: str
    output: str
    requests: int = 1
    rate: float = 0.0  # requests a second
    seconds: float = 0.0  # of counting

    def lengths(self) -> list[tuple[int, int]]:
        """Prompt and answer of each request: evenly spread, the same in every arm."""
        (p_low, p_high), (o_low, o_high) = span(self.prompt), span(self.output)
        found = []
        for index in range(self.requests):
            u, v, _ = _point(index)
            found.append((p_low + round(u * (p_high - p_low)), o_low + round(v * (o_high - o_low))))
        return found

    def under_way(self, tokens: int) -> list[tuple[int, int]]:
        """Requests of the steady state that hold up to ``tokens``: what they have, what they still write."""
        (p_low, p_high), (o_low, o_high) = span(self.prompt), span(self.output)
        found: list[tuple[int, int]] = []
        while True:
            u, v, w = _point(len(found))
            prompt = p_low + round(u * (p_high - p_low))
            output = (o_low**2 + v * (o_high**2 - o_low**2)) ** 0.5  # a long one is met more often
            written = int(w * output)
            tokens -= prompt + written
            if tokens < 0:
                return found
            found.append((prompt + written, max(1, round(output) - written)))

    @property
    def resident(self) -> float:
        """Mean length of a request while it is decoded."""
        (p_low, p_high), (o_low, o_high) = span(self.prompt), span(self.output)
        if o_low == o_high:
            return (p_low + p_high) / 2 + o_low / 2
        squares = (o_low**2 + o_low * o_high + o_high**2) / 3
        return (p_low + p_high) / 2 + squares / (o_low + o_high)

    @property
    def longest_prompt(self) -> int:
        """Of a new request, or of one under way."""
        return span(self.prompt)[1] + (span(self.output)[1] if self.kind == "steady" else 0)


WORKS = {
    "bound": Work("steady", "256-1024", "5120-8704", requests=90, seconds=45),
    "ample": Work("batch", "512", "512", requests=48),
    "alone": Work("alone", "128", "512"),
    "load": Work("poisson", "2048", "512", requests=140, rate=7),
}


def span(lengths: str) -> tuple[int, int]:
    low, _, high = lengths.partition("-")
    return int(low), int(high or low)


def measure(engine: Any, work: Work, tokens: int) -> dict[str, Any]:
    """The figures of one work on an engine whose KV pool holds ``tokens``."""
    if work.kind == "alone":
        return alone(engine, work)
    if work.kind == "batch":
        return batch(engine, work)
    run = steady(engine, work, tokens) if work.kind == "steady" else open_loop(engine, work)
    return engine.loop.run_until_complete(run)


def alone(engine: Any, work: Work) -> dict[str, Any]:
    """Output tokens a second of one request at a time: the difference of a long and a short answer."""
    prompt, output = work.lengths()[0]
    ids, seconds = _random_tokens(engine, 0, prompt), []
    for new in (16, 16 + output):
        began = time.perf_counter()
        engine.generate(input_ids=[ids], sampling_params={**GREEDY, "max_new_tokens": new})
        seconds.append(time.perf_counter() - began)
    return {"tokens_per_second": output / (seconds[1] - seconds[0])}


def batch(engine: Any, work: Work) -> dict[str, Any]:
    """All requests at once, prefill included."""
    lengths = work.lengths()
    began = time.perf_counter()
    answers = engine.generate(
        input_ids=[_random_tokens(engine, index, prompt) for index, (prompt, _) in enumerate(lengths)],
        sampling_params=[{**GREEDY, "max_new_tokens": output} for _, output in lengths],
    )
    seconds = time.perf_counter() - began
    written = [answer["meta_info"]["completion_tokens"] for answer in answers]
    assert written == [output for _, output in lengths], "unequal work"
    return {"tokens_per_second": sum(written) / seconds, "seconds": seconds}


async def steady(engine: Any, work: Work, tokens: int) -> dict[str, Any]:
    """Tokens of ``work.seconds`` with the pool full: a window of a server that never runs empty."""
    first = work.under_way(int(0.9 * tokens))
    crowd = Crowd(engine, first + work.lengths(), every=COARSE)
    crowd.send_all()
    filled = time.perf_counter() + FILL  # SGLang's scheduler dares more from step to step
    while not all(crowd.written[: len(first)]) and time.perf_counter() < filled:
        await asyncio.sleep(0.05)
        crowd.check()
    await asyncio.sleep(SETTLE)
    before, began, samples = sum(crowd.written), time.perf_counter(), []
    while time.perf_counter() - began < work.seconds:
        await asyncio.sleep(0.5)
        samples.append(crowd.running())
    seconds, new = time.perf_counter() - began, sum(crowd.written) - before
    crowd.check()
    assert crowd.waiting(), "the queue ran empty: give the work more requests"
    finished = crowd.finished
    await crowd.abort()
    requests, held = (statistics.fmean(values) for values in zip(*samples, strict=True))
    return {
        "tokens_per_second": new / seconds,
        "seconds": seconds,
        "running": requests,
        "resident": held / requests,
        "pool_used": held / tokens,
        "finished": finished,
    }


async def open_loop(engine: Any, work: Work) -> dict[str, Any]:
    """Poisson arrivals; time to the first token and between tokens, as the client sees them."""
    draw = random.Random(1)
    crowd = Crowd(engine, work.lengths(), every=1)
    began, due, samples = time.perf_counter(), 0.0, []
    for index in range(work.requests):
        due += draw.expovariate(work.rate)
        while (rest := began + due - time.perf_counter()) > 0:
            await asyncio.sleep(min(rest, 0.1))
            samples.append(crowd.running()[0])
        crowd.send(index)
    await asyncio.gather(*crowd.tasks)
    seconds = time.perf_counter() - began
    return {
        "tokens_per_second": sum(crowd.written) / seconds,
        "seconds": seconds,
        "running": statistics.fmean(samples),
        "most_running": max(samples),
        "ttft_ms": _percentiles(crowd.first),
        "itl_ms": _percentiles(crowd.gaps),
    }


class Crowd:
    """Streaming requests and how far each is."""

    def __init__(self, engine: Any, lengths: list[tuple[int, int]], every: int) -> None:
        self.engine, self.lengths, self.every = engine, lengths, every
        self.written = [0] * len(lengths)
        self.first: list[float] = []  # seconds to the first token
        self.gaps: list[float] = []  # seconds a token
        self.tasks: list[asyncio.Task[None]] = []

    def send_all(self) -> None:
        for index in range(len(self.lengths)):
            self.send(index)

    def send(self, index: int) -> None:
        self.tasks.append(asyncio.create_task(self._one(index)))

    async def _one(self, index: int) -> None:
        prompt, output = self.lengths[index]
        sampling = {**GREEDY, "max_new_tokens": output, "stream_interval": self.every}
        sent = last = time.perf_counter()
        stream = await self.engine.async_generate(
            input_ids=_random_tokens(self.engine, index, prompt), sampling_params=sampling, stream=True
        )
        async for chunk in stream:
            now, seen, count = (
                time.perf_counter(),
                self.written[index],
                chunk["meta_info"]["completion_tokens"],
            )
            if seen == 0:
                self.first.append(now - sent)
            elif count > seen:
                self.gaps.extend([(now - last) / (count - seen)] * (count - seen))
            self.written[index], last = count, now

    def running(self) -> tuple[int, int]:
        """Requests that have begun and not ended, and the tokens that they hold."""
        live = [
            prompt + written
            for (prompt, output), written in zip(self.lengths, self.written, strict=True)
            if 0 < written < output
        ]
        return len(live), sum(live)

    def waiting(self) -> int:
        return self.written.count(0)

    @property
    def finished(self) -> int:
        return sum(w == output for w, (_, output) in zip(self.written, self.lengths, strict=True))

    def check(self) -> None:
        """Raise what a request raised."""
        for task in self.tasks:
            if task.done():
                task.result()

    async def abort(self) -> None:
        self.engine.tokenizer_manager.abort_request(abort_all=True)
        await asyncio.wait(self.tasks, timeout=20)


def _point(index: int) -> tuple[float, float, float]:
    u, v, w = ((0.5 + index * step) % 1 for step in KRONECKER)
    return u, v, w


def _random_tokens(engine: Any, seed: int, count: int) -> list[int]:
    draw, vocabulary = random.Random(seed), engine.tokenizer_manager.model_config.vocab_size
    return [draw.randrange(4, min(30000, vocabulary)) for _ in range(count)]


def _percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{which}": 1000 * cuts[which - 1] for which in (50, 99)}


def adjusted(name: str, changes: dict[str, Any]) -> Work:
    """A named work with some of its fields changed."""
    return replace(WORKS[name], **{key: value for key, value in changes.items() if value})
