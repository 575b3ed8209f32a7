"""Batched generation inside the training process, on the model's own weight tensors, with mixed attention.

Requests take slots; a slot whose request finishes is given to the next one at once. The last prompt token is
decoded like every later token, so prompt processing only fills the cache and never makes logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlkv.attention import NAME
from rlkv.errors import RLKVError
from rlkv.requests import Completion, check_settings, checked_gates, checked_prompts, end_ids, evaluating
from rlkv.sampling import SamplingParams, choose
from rlkv.schedule import Pace, Schedule
from rlkv.slot_state import SlotState
from rlkv.slots import Prefill, SlotCache, Span
from rlkv.step_graphs import StepGraphs, takes_graphs
from rlkv.window import Window

__all__ = ["Completion", "Sampler", "SamplingParams"]


@dataclass
class _Run:
    """One call of ``generate``."""

    prompts: list[list[int]]
    params: SamplingParams
    gates: torch.Tensor | None  # [1 or N, layers, kv_heads]
    keys: torch.Tensor  # random stream of each request
    stop: torch.Tensor
    schedule: Schedule


class Sampler:
    """Generates for many prompts on ``slots`` slots of ``max_length`` tokens each (prompt and completion).

    ``prefill`` "local": gates act on prompt tokens too, as in training; "full": prompt tokens attend fully.
    ``cuda_graphs`` None means on CUDA only. Sets the model's attention to "rlkv". Raises RLKVError for a
    model whose KV heads can't be gated or whose RoPE follows the longest request (dynamic, longrope).
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
        shape = check_settings(model, slots, max_length, prefill)
        weight = next(model.parameters())
        model.set_attn_implementation(NAME)
        self.model, self.slots, self.max_length = model, slots, max_length
        self.tokens_per_second = 0.0  # of the last call of generate
        self._heads = (shape.layers, shape.kv_heads)
        self._device = weight.device
        self._graphs = StepGraphs(model) if takes_graphs(cuda_graphs, weight.device) else None
        self._pace = Pace.on_cuda(slots, self._graphs is not None) if weight.is_cuda else Pace.on_cpu()
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

    @property
    def window(self) -> Window:
        """Of local heads; another may be set between calls of ``generate``."""
        return self._cache.window

    @window.setter
    def window(self, window: Window) -> None:
        self._cache.window = window

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
        with evaluating(self.model):
            while run.schedule.waiting or run.schedule.live:
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
            keys=params.keys(len(prompts), self._device),
            stop=self._stops.setdefault(ids, self._tensor(ids)),  # one tensor for good: graphs read it
            schedule=Schedule(len(prompts), self.slots, self.max_length, self._pace),
        )

    def _tensor(self, values: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _gates_of(self, run: _Run, requests: list[int]) -> torch.Tensor | None:
        if run.gates is None or len(run.gates) == 1:
            return run.gates
        return run.gates[self._tensor(requests)]

    def _admit(self, run: _Run) -> None:
        """Give free slots to waiting requests, and process their prompts up to the last token."""
        slots = dict(sorted(run.schedule.take(), key=lambda pair: len(run.prompts[pair[0]])))
        if not slots:
            return
        requests, where = list(slots), self._tensor(list(slots.values()))
        prompts = [run.prompts[request] for request in requests]
        for request, slot in slots.items():
            run.schedule.start(request, slot, len(run.prompts[request]) - 1)
        self._cache.clear(where)
        self._prefill(run, slots)
        start = self._tensor(
            [
                [prompt[-1] for prompt in prompts],
                [len(prompt) - 1 for prompt in prompts],
                [min(run.params.max_new_tokens, self.max_length - len(prompt)) for prompt in prompts],
            ]
        )
        start = torch.cat([start, run.keys[self._tensor(requests)][None]])
        gates = self._gates_of(run, requests)
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
            size = max(1, self._pace.prompt_tokens // longest)
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
        for moves in (run.schedule.shrink(), run.schedule.sort()):
            if moves:
                source, target = self._tensor(moves).unbind(1)
                self._cache.move(source, target, max(run.schedule.reach))
                self._state.move(source, target)

    def _decode(self, run: _Run) -> None:
        """A few steps of every row, without waiting for their results."""
        spans, params = run.schedule.spans(), run.params
        fixed = (self.window, params.temperature, params.top_p, params.top_k, id(run.stop))
        for _ in range(self._pace.every):
            if self._graphs is None:
                self._step(run, spans)
            else:
                self._graphs.run((spans, run.gates is None, *fixed), lambda: self._step(run, spans))
        run.schedule.advance()

    def _step(self, run: _Run, spans: Sequence[Span]) -> None:
        state, rows = self._state, run.schedule.rows
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
        active = self._state.active[: run.schedule.rows].tolist()
        slots = [slot for slot in run.schedule.live if not active[slot]]
        if not slots:
            return
        stop = set(run.stop.tolist())
        for slot, (tokens, logprobs) in zip(slots, self._state.results(slots), strict=True):
            index = run.schedule.finish(slot)
            if math.isnan(sum(logprobs)):
                raise RLKVError(f"sampler: NaN logits for prompt {index}; check the weights and the dtype")
            yield Completion(index, tokens, logprobs, "stop" if tokens[-1] in stop else "length")
