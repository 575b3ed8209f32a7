"""Batched generation inside the training process, on the model's own weight tensors, with mixed attention.

Requests take slots; a slot whose request finishes is given to the next one at once. The last prompt token is
decoded like every later token, so prompt processing only fills the cache and never makes logits.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlkv.attention import NAME
from rlkv.errors import RLKVError
from rlkv.requests import Completion, checked_gates, checked_prompts, end_ids
from rlkv.sampling import SamplingParams, choose, request_keys
from rlkv.slot_state import SlotState
from rlkv.slots import Prefill, SlotCache, Span
from rlkv.step_graphs import StepGraphs
from rlkv.support import check_model
from rlkv.window import Window

__all__ = ["Completion", "Sampler", "SamplingParams"]


@dataclass
class _Run:
    """One call of ``generate``: what waits, and which request holds which slot."""

    prompts: list[list[int]]
    params: SamplingParams
    gates: torch.Tensor | None  # [1 or N, layers, kv_heads]
    keys: torch.Tensor  # random stream of each request
    stop: torch.Tensor
    waiting: deque[int]
    owner: list[int | None]  # request of each slot
    reach: list[int]  # upper bound of each slot's position
    rows: int  # slots that a step computes

    @property
    def live(self) -> list[int]:
        return [slot for slot in range(self.rows) if self.owner[slot] is not None]

    @property
    def free(self) -> list[int]:
        return [slot for slot in range(self.rows) if self.owner[slot] is None]


class Sampler:
    """Generates for many prompts on ``slots`` slots of ``max_length`` tokens each (prompt and completion).

    ``prefill`` "local": gates act on prompt tokens too, as in training; "full": prompt tokens attend fully.
    ``cuda_graphs`` None means on CUDA only. Sets the model's attention to "rlkv". Raises RLKVError for a
    model whose KV heads cannot be gated.
    """

    def __init__(
        self,
        model: Any,
        window: Window,
        *,
        slots: int = 64,
        max_length: int,
        prefill: Prefill = "local",
        cuda_graphs: bool | None = None,
    ) -> None:
        shape = check_model(model)
        weight = next(model.parameters())
        if slots < 1 or max_length < 2:
            raise RLKVError(f"sampler: needs slots >= 1 and max_length >= 2, got {slots} and {max_length}")
        if prefill not in ("local", "full"):
            raise RLKVError(f'sampler: prefill must be "local" or "full", got {prefill!r}')
        if cuda_graphs and not weight.is_cuda:
            raise RLKVError(f"sampler: cuda_graphs=True needs a model on CUDA, it is on {weight.device}")
        model.set_attn_implementation(NAME)
        self.model, self.window, self.slots, self.max_length = model, window, slots, max_length
        self.tokens_per_second = 0.0  # of the last call of generate
        self._heads = (shape.layers, shape.kv_heads)
        self._device = weight.device
        self._graphs = StepGraphs(model) if weight.is_cuda and cuda_graphs is not False else None
        self._every = 8 if weight.is_cuda else 1  # steps between looks at which requests have finished
        self._round = 128 if weight.is_cuda else 32  # columns are rounded up to this
        self._prompt_tokens = 65536 if weight.is_cuda else 2048  # in one forward, padding included
        self._groups = 1 if weight.is_cuda else 4  # slots of like length that attend together
        self._refill = max(1, slots // 16) if weight.is_cuda else 1  # free slots worth a prompt pass
        self._stops: dict[tuple[int, ...], torch.Tensor] = {}
        self._state = SlotState(slots, max_length, *self._heads, self._device)
        self._cache = SlotCache(
            *self._heads,
            shape.head_dim,
            slots=slots,
            max_length=max_length,
            window=window,
            prefill=prefill,
            dtype=weight.dtype,
            device=self._device,
        )

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        gates: torch.Tensor | None = None,
        on_finish: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """Completions in prompt order. ``gates`` [layers, kv_heads], or [N, layers, kv_heads] for one set a
        prompt, or None for full attention. ``on_finish`` is called as each request finishes.

        Raises RLKVError for an empty or over-long prompt, and for gates of another shape or with NaN.
        """
        run = self._start(prompts, params or SamplingParams(), gates)
        done: dict[int, Completion] = {}
        began = time.perf_counter()
        with self._evaluating():
            while run.waiting or run.live:
                self._admit(run)
                self._arrange(run)
                self._decode(run)
                for completion in self._finished(run):
                    done[completion.index] = completion
                    if on_finish is not None:
                        on_finish(completion)
        generated = sum(len(completion.tokens) for completion in done.values())
        self.tokens_per_second = generated / max(time.perf_counter() - began, 1e-9)
        return [done[index] for index in range(len(run.prompts))]

    def _start(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, gates: torch.Tensor | None
    ) -> _Run:
        ids = params.stop_ids or end_ids(self.model)
        self._state.active.zero_()
        if self._graphs:
            self._graphs.refresh()
        return _Run(
            prompts=checked_prompts(prompts, self.max_length),
            params=params,
            gates=checked_gates(gates, len(prompts), *self._heads, self._device),
            keys=request_keys(params.seed, torch.arange(len(prompts), device=self._device)),
            stop=self._stops.setdefault(ids, self._tensor(ids)),  # one tensor for good: graphs read it
            waiting=deque(range(len(prompts))),
            owner=[None] * self.slots,
            reach=[0] * self.slots,
            rows=self._rows(len(prompts)),
        )

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """In train() mode gradient checkpointing would drop the cache."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def _tensor(self, values: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _rows(self, live: int) -> int:
        """Rows that a step computes for ``live`` requests; with graphs a power of two: few graphs."""
        return min(self.slots, live if self._graphs is None or live < 2 else 1 << (live - 1).bit_length())

    def _gates_of(self, run: _Run, requests: list[int]) -> torch.Tensor | None:
        if run.gates is None or len(run.gates) == 1:
            return run.gates
        return run.gates[self._tensor(requests)]

    def _admit(self, run: _Run) -> None:
        """Give free slots to waiting requests, and process their prompts up to the last token."""
        free = run.free
        if not run.waiting or len(free) < min(self._refill, run.rows):
            return
        taken = [run.waiting.popleft() for _ in range(min(len(free), len(run.waiting)))]
        batch = sorted(taken, key=lambda request: len(run.prompts[request]))
        slots = dict(zip(batch, free, strict=False))
        for request, slot in slots.items():
            run.owner[slot], run.reach[slot] = request, len(run.prompts[request]) - 1
        where = self._tensor(list(slots.values()))
        self._cache.clear(where)
        self._prefill(run, slots)
        lengths = [len(run.prompts[request]) for request in batch]
        start = self._tensor(
            [
                [run.prompts[request][-1] for request in batch],
                [length - 1 for length in lengths],
                [min(run.params.max_new_tokens, self.max_length - length) for length in lengths],
            ]
        )
        start = torch.cat([start, run.keys[self._tensor(batch)][None]])
        gates = self._gates_of(run, batch)
        self._state.admit(where, start, 1.0 if gates is None else gates)

    def _prefill(self, run: _Run, slots: dict[int, int]) -> None:
        """``slots``: slot of each request, by rising prompt length. Equal prompts are processed once."""
        own_gates = run.gates is not None and len(run.gates) > 1
        first: dict[Hashable, int] = {}
        copies: list[tuple[int, int]] = []
        todo: list[int] = []
        for request, slot in slots.items():
            prompt = run.prompts[request]
            same = first.setdefault((*prompt, request if own_gates else None), slot)
            if same != slot:
                copies.append((same, slot))
            elif len(prompt) > 1:
                todo.append(request)
        while todo:
            longest = len(run.prompts[todo[-1]]) - 1
            size = max(1, self._prompt_tokens // longest)
            todo, part = todo[:-size], todo[-size:]
            rows = [run.prompts[request][:-1] for request in part]
            self._cache.prompt(self._tensor([slots[request] for request in part]), self._gates_of(run, part))
            self.model.base_model(
                input_ids=self._tensor([row + [0] * (longest - len(row)) for row in rows]),
                position_ids=torch.arange(longest, device=self._device).expand(len(rows), -1),
                past_key_values=self._cache,
                use_cache=True,
            )
        if copies:
            source, target = self._tensor(copies).unbind(1)
            self._cache.move(source, target, max(len(run.prompts[request]) for request in slots))

    def _arrange(self, run: _Run) -> None:
        """Keep the computed rows few and, where slots attend in groups, the groups of like length."""
        live = run.live
        rows = self._rows(len(live))
        if not run.waiting and rows < run.rows:
            self._move(run, list(zip([slot for slot in live if slot >= rows], run.free, strict=False)))
            run.rows = rows
        by_length = sorted(range(run.rows), key=lambda slot: run.reach[slot])
        if self._cost(run, range(run.rows)) > 1.1 * self._cost(run, by_length):
            self._move(run, [(old, new) for new, old in enumerate(by_length) if old != new])

    def _move(self, run: _Run, pairs: list[tuple[int, int]]) -> None:
        """Move requests from the first slot of each pair to the second."""
        if not pairs:
            return
        source, target = self._tensor(pairs).unbind(1)
        self._cache.move(source, target, max(run.reach[old] for old, _ in pairs))
        self._state.move(source, target)
        owner, reach = list(run.owner), list(run.reach)
        for old, new in pairs:
            run.owner[new], run.reach[new] = owner[old], reach[old]

    def _spans(self, run: _Run, order: Sequence[int]) -> list[Span]:
        """Spans of the rows as they would be with the slots in this order."""
        size = -(-run.rows // self._groups)
        spans: list[Span] = []
        for start in range(0, run.rows, size):
            farthest = max(run.reach[slot] for slot in order[start : start + size]) + self._every
            columns = min(-(-farthest // self._round) * self._round, self.max_length)
            first = spans.pop()[0] if spans and spans[-1][2] == columns else start
            spans.append((first, min(start + size, run.rows), columns))
        return spans

    def _cost(self, run: _Run, order: Sequence[int]) -> int:
        return sum((stop - start) * columns for start, stop, columns in self._spans(run, order))

    def _decode(self, run: _Run) -> None:
        """A few steps of every row, without waiting for their results."""
        spans = tuple(self._spans(run, range(run.rows)))
        params = run.params
        drawing = (params.temperature, params.top_p, params.top_k, id(run.stop))
        key = (spans, run.gates is None, *drawing)
        for _ in range(self._every):
            if self._graphs is None:
                self._step(run, spans)
            else:
                self._graphs.run(key, lambda: self._step(run, spans))
        for slot in run.live:
            run.reach[slot] = min(run.reach[slot] + self._every, self.max_length - 1)

    def _step(self, run: _Run, spans: Sequence[Span]) -> None:
        state, rows = self._state, run.rows
        gates: torch.Tensor | None = None
        if run.gates is not None:
            gates = state.gates[:rows]
            if self._cache.prefill == "full":  # the last prompt token is still prompt
                gates = gates.masked_fill((state.count[:rows] == 0)[:, None, None], 1.0)
        self._cache.decode(state.position[:rows], spans, gates)
        logits = self.model(
            input_ids=state.token[:rows, None],
            position_ids=state.position[:rows, None],
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]
        token, logprob = choose(logits, run.params, state.key[:rows], state.count[:rows])
        state.record(rows, token, logprob, run.stop)

    def _finished(self, run: _Run) -> Iterator[Completion]:
        active = self._state.active[: run.rows].tolist()
        slots = [slot for slot in run.live if not active[slot]]
        if not slots:
            return
        stop = set(run.stop.tolist())
        for slot, (tokens, logprobs) in zip(slots, self._state.results(slots), strict=True):
            index, run.owner[slot], run.reach[slot] = run.owner[slot], None, 0
            assert index is not None
            if math.isnan(sum(logprobs)):
                raise RLKVError(f"sampler: NaN logits for prompt {index}; check the weights and the dtype")
            yield Completion(index, tokens, logprobs, "stop" if tokens[-1] in stop else "length")
