"""The sampler on paged memory, of a given number of bytes: see :class:`PagedSampler`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch

from rlkv.attention import NAME
from rlkv.errors import RLKVError
from rlkv.family import FamilyForward
from rlkv.logprobs import check_head
from rlkv.paged.admission import next_jobs
from rlkv.paged.cache import PagedCache
from rlkv.paged.pool import PagePool, pages_in
from rlkv.paged.prefill import prefill
from rlkv.paged.state import Job, Live, PagedState, Run, make_jobs
from rlkv.paged.tables import PageTables
from rlkv.requests import Completion, check_settings, checked_gates, checked_prompts, end_ids, evaluating
from rlkv.sampling import SamplingParams, choose
from rlkv.slots import Prefill
from rlkv.step_graphs import StepGraphs, takes_graphs
from rlkv.window import Window

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)  # rows of a captured step


class PagedSampler:
    """:class:`rlkv.sampler.Sampler` with pages: the same ``generate``, the same completions, less memory.

    Every (layer, KV head) of a request has its own pages of ``page_size`` tokens. With soft gates all heads
    hold every token, and one reading yields both branches; when every gate is 0 or 1, local heads hold sink +
    recent tokens alone. Equal prompts share the full pages of their prompt. ``kv_bytes``: memory of all pages
    (None: as much as ``slots`` requests of ``max_length`` need). A request is admitted when pages for it are
    free; should they run out later, the youngest gives its pages back, waits, and goes on where it was.

    ``join_weights`` lays the weights that one product can serve side by side, in place (None: on CUDA).
    ``release``: give the pages' memory back after each ``generate``, and take it again for the next.
    Raises RLKVError as Sampler does, and when the pages can't hold a single request.
    """

    def __init__(
        self,
        model: Any,
        window: Window,
        *,
        slots: int = 64,
        max_length: int,
        prefill: Prefill = "local",
        kv_bytes: int | None = None,
        page_size: int = 64,
        cuda_graphs: bool | None = None,
        join_weights: bool | None = None,
        release: bool = False,
    ) -> None:
        shape = check_settings(model, slots, max_length, prefill)
        weight = next(model.parameters())
        if page_size < 16 or page_size & (page_size - 1):
            raise RLKVError(f"sampler: page_size must be a power of two from 16 on, got {page_size}")
        model.set_attn_implementation(NAME)
        self.model, self.slots, self.max_length = model, slots, max_length
        self.tokens_per_second = 0.0  # of the last call of generate
        self.preemptions = 0  # of the last call of generate
        self._shape, self._device = shape, weight.device
        # a look at which requests have finished waits for the device; a prompt pass is many launches
        self._every, self._refill = (8, max(1, slots // 16)) if weight.is_cuda else (1, 1)
        self._prompt_tokens = 16384 if weight.is_cuda else 2048
        self._release = release
        self._stops: dict[tuple[int, ...], torch.Tensor] = {}
        heads = (shape.layers, shape.kv_heads)
        if kv_bytes is None:
            pages = slots * shape.layers * shape.kv_heads * -(-max_length // page_size) + 1
        else:
            pages = pages_in(kv_bytes, shape, page_size, weight.dtype)
        self.pool = PagePool(pages)
        self._state = PagedState(slots, max_length, *heads, self._device)
        self._tables = PageTables(
            *heads,
            slots=slots,
            max_length=max_length,
            page_size=page_size,
            pool=self.pool,
            window=window,
            device=self._device,
        )
        self._cache = PagedCache(
            shape,
            pages=pages,
            page_size=page_size,
            slots=slots,
            max_length=max_length,
            window=window,
            prefill=prefill,
            dtype=weight.dtype,
            device=self._device,
        )
        graphs = takes_graphs(cuda_graphs, self._device, self._cache.on_kernels)
        self._graphs = StepGraphs(model) if graphs else None
        self._fits: bool | None = None
        self._family: FamilyForward | None = None
        self._pick_forward(weight.is_cuda if join_weights is None else join_weights)

    @property
    def window(self) -> Window:
        """Of local heads; another may be set between calls of ``generate``."""
        return self._cache.window

    @window.setter
    def window(self, window: Window) -> None:
        self._cache.window = self._tables.window = window

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        gates: torch.Tensor | None = None,
        on_finish: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """Completions in prompt order; as :meth:`rlkv.sampler.Sampler.generate`."""
        run = self._start(prompts, params or SamplingParams(), gates)
        done: dict[int, Completion] = {}
        began = time.perf_counter()
        try:
            self._hold()
            with evaluating(self.model):
                while run.waiting or run.live:
                    for step in (self._admit, self._decode):
                        step(run)
                        for completion in self._finished(run):
                            done[completion.index] = completion
                            if on_finish is not None:
                                on_finish(completion)
        except BaseException:
            self._tables.clear()  # the device's part waits for the next call: it might fail too
            raise
        finally:
            if self._release:
                self._cache.release()
        generated = sum(len(completion.tokens) for completion in done.values())
        self.tokens_per_second = generated / max(time.perf_counter() - began, 1e-9)
        return [done[index] for index in range(run.jobs)]

    def _start(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, gates: torch.Tensor | None
    ) -> Run:
        ids = params.stop_ids or end_ids(self.model)
        shape = self._shape
        checked = checked_prompts(prompts, self.max_length)
        values = checked_gates(gates, len(checked), shape.layers, shape.kv_heads, self._device)
        hard = values is not None and bool(((values == 0) | (values == 1)).all())
        on_host = torch.ones(1, shape.layers, shape.kv_heads) if values is None else values.cpu()
        waiting = make_jobs(checked, on_host.numpy(), hard, params.max_new_tokens, self.max_length)
        for job in waiting:
            need = self._tables.need(job.rows, job.most)
            if need > self.pool.free:
                raise RLKVError(
                    f"sampler: the KV pages ({self.pool.free} of {self._tables.page_size} tokens) can't hold "
                    f"prompt {job.index} with {job.limit} new tokens, which is {need} pages; give more "
                    "kv_bytes or fewer max_new_tokens"
                )
        self._pick_forward()
        self._state.clear()
        self.preemptions, self.pool.most_used = 0, self.pool.used
        return Run(
            jobs=len(checked),
            params=params,
            gates=values,
            hard=hard,
            keys=params.keys(len(checked), self._device),
            stop=self._stops.setdefault(ids, self._tensor(ids)),  # one tensor for good: graphs read it
            waiting=waiting,
        )

    def _pick_forward(self, join: bool = False) -> None:
        """The family's forward, unless by now something is attached to the model: then its own."""
        fits = FamilyForward.fits(self.model)
        if fits != self._fits:
            self._fits, self._family = fits, FamilyForward(self.model, join) if fits else None
            if not fits:
                check_head(self.model)

    def _hold(self) -> None:
        """Take the pages' memory; graphs of steps on another place are dropped."""
        self._cache.hold()
        if self._graphs:
            self._graphs.refresh(self._cache.keys, self._cache.values)

    def _tensor(self, values: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _admit(self, run: Run) -> None:
        """Give slots and pages to waiting jobs, process their tokens, and choose the next one of each."""
        jobs = next_jobs(run, self._tables, self.slots, self._refill)
        if not jobs:
            return
        empty = (slot for slot in range(self.slots) if slot not in run.live)
        slots = dict(zip((job.index for job in jobs), empty, strict=False))
        leaders: dict[Hashable, Job] = {}
        forks: list[tuple[Job, Job]] = []
        for job in jobs:
            run.waiting.popleft()
            slot = slots[job.index]
            self._tables.open(slot, job.rows)
            run.live[slot] = Live(job, len(job.tokens))
            leader = leaders.setdefault(job.same, job)
            if leader is job:
                self._tables.grow(slot, len(job.tokens))
            else:
                forks.append((leader, job))
        self._tables.flush()
        table, todo = self._tables.table, list(leaders.values())
        hidden = prefill(self.model, self._cache, table, run, todo, slots, self._prompt_tokens)
        pairs = [
            self._tables.fork(slots[leader.index], slots[job.index], len(job.tokens)) for leader, job in forks
        ]
        if pairs:
            source, target = (torch.cat([torch.from_numpy(p[i]) for p in pairs]).long() for i in (0, 1))
            self._cache.copy_pages(source.to(self._device), target.to(self._device))
        self._tables.flush()
        self._begin(run, jobs, slots, torch.stack([hidden[leaders[job.same].index] for job in jobs]))

    def _begin(self, run: Run, jobs: list[Job], slots: dict[int, int], hidden: torch.Tensor) -> None:
        """Choose the token after each job's tokens, from ``hidden`` [n, width]."""
        state, where = self._state, self._tensor([slots[job.index] for job in jobs])
        keys = run.keys[self._tensor([job.index for job in jobs])]
        start = self._tensor(
            [
                [job.tokens[-1] for job in jobs],
                [len(job.tokens) - 1 for job in jobs],
                [job.limit for job in jobs],
            ]
        )
        gates = run.gates_of([job.index for job in jobs])
        state.admit(where, torch.cat([start, keys[None]]), 1.0 if gates is None else gates)
        state.full[where] = True if gates is None or run.soft else gates == 1
        for job in jobs:
            written = len(job.logprobs)
            if written:
                state.tokens[slots[job.index], :written] = self._tensor(job.tokens[job.prompt :])
                state.logprobs[slots[job.index], :written] = torch.tensor(job.logprobs, device=self._device)
        state.count[where] = self._tensor([len(job.logprobs) for job in jobs])
        logits = self.model.get_output_embeddings()(hidden)
        state.begin(where, *choose(logits, run.params, keys, state.count[where]), run.stop)

    def _decode(self, run: Run) -> None:
        """A few steps of every live row, without waiting for their results."""
        self._make_room(run)
        if not run.live:
            return
        rows = self._compact(run)
        self._tables.flush()
        params = run.params
        fixed = (self.window, params.temperature, params.top_p, params.top_k, id(run.stop))
        for _ in range(self._every):
            if self._graphs is None:
                self._step(run, rows)
            else:
                self._graphs.run((rows, run.soft, run.hard, *fixed), lambda: self._step(run, rows))
        for live in run.live.values():
            live.at += self._every

    def _make_room(self, run: Run) -> None:
        """Pages for the next steps of every live row, oldest first; the youngest pay when there are none."""
        for slot in list(run.live):
            while slot in run.live:
                live = run.live[slot]
                length = min(live.at + self._every, live.job.most)
                if self._tables.need_more(slot, length) <= self.pool.free:
                    self._tables.grow(slot, length)
                    break
                self._preempt(run, list(run.live)[-1])

    def _preempt(self, run: Run, slot: int) -> None:
        """Take a live request's pages; it waits, first in line, with what it has written."""
        job = run.live[slot].job
        tokens, logprobs = self._state.results([slot])[0]
        job.tokens, job.logprobs = job.tokens[: job.prompt] + tokens, logprobs
        run.waiting.appendleft(job)
        self._vacate(run, [slot])
        self.preemptions += 1

    def _vacate(self, run: Run, slots: list[int]) -> None:
        for slot in slots:
            del run.live[slot]
            self._tables.release(slot)
        if slots:
            self._state.leave(self._tensor(slots))

    def _compact(self, run: Run) -> int:
        """Move live rows down where that makes the step smaller; the number of rows to compute."""
        rows = self._bucket(len(run.live))
        high = [slot for slot in run.live if slot >= rows]
        if high:
            moves = list(zip(high, (slot for slot in range(rows) if slot not in run.live), strict=False))
            self._tables.move(moves)
            source, target = self._tensor(moves).unbind(1)
            self._state.move(source, target)
            self._state.leave(source)
            new = dict(moves)
            run.live = {new.get(slot, slot): live for slot, live in run.live.items()}
        return rows

    def _bucket(self, rows: int) -> int:
        if self._graphs is None:
            return rows
        return min(next((size for size in BUCKETS if size >= rows), self.slots), self.slots)

    def _step(self, run: Run, rows: int) -> None:
        state = self._state
        position = state.position[:rows]
        self._cache.decode(
            self._tables.table[:, :rows],
            position,
            state.full[:rows] if run.hard else None,
            state.gates[:rows] if run.soft else None,
        )
        if self._family is None:
            hidden = self.model.base_model(
                input_ids=state.token[:rows, None],
                position_ids=position.clamp(min=0)[:, None],
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
        else:
            hidden = self._family(state.token[:rows], position.clamp(min=0), self._cache.attend_one)
        logits = self.model.get_output_embeddings()(hidden)
        token, logprob = choose(logits, run.params, state.key[:rows], state.count[:rows])
        state.record(rows, token, logprob, run.stop)

    def _finished(self, run: Run) -> Iterator[Completion]:
        active = self._state.active.tolist()
        slots = [slot for slot in run.live if not active[slot]]
        if not slots:
            return
        stop = set(run.stop.tolist())
        found = [
            (run.live[slot].job, result)
            for slot, result in zip(slots, self._state.results(slots), strict=True)
        ]
        self._vacate(run, slots)
        for job, (tokens, logprobs) in found:
            if math.isnan(sum(logprobs)):
                raise RLKVError(
                    f"sampler: NaN logits for prompt {job.index}; check the weights and the dtype"
                )
            yield Completion(job.index, tokens, logprobs, "stop" if tokens[-1] in stop else "length")
