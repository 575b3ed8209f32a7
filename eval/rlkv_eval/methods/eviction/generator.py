"""Batched generation on an evicting cache, with the sampler's schedule, slot state and choice of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rlkv.attention import NAME
from rlkv.errors import RLKVError
from rlkv.mask import HeadMask
from rlkv.requests import Completion, check_positions, checked_prompts, end_ids
from rlkv.sampling import SamplingParams, choose
from rlkv.schedule import Pace, Schedule
from rlkv.slot_state import SlotState
from rlkv_eval.methods.base import Context
from rlkv_eval.methods.eviction.cache import EvictingCache
from rlkv_eval.methods.eviction.ledger import Ledger
from rlkv_eval.methods.eviction.plan import Plan
from rlkv_eval.methods.eviction.policy import Policy

EVICTION_STREAM = 2**32  # added to the seed: what is dropped is drawn apart from what is sampled


@dataclass
class EvictingGenerator:
    """Prompts are processed with full attention, then cut to the budget; nothing is ever renumbered.

    That is the prefill policy "full" for every method, whatever the context's: these rules need the prompt's
    attention before they can drop any of it.
    ``observer`` is called after every step with the cache and the live slots' requests.
    """

    name: str
    context: Context
    plan: Plan
    policy: Policy
    mask: HeadMask | None = None
    observer: Callable[[EvictingCache, dict[int, int]], None] | None = field(default=None, repr=False)

    def kv_bytes(self, length: int) -> int:
        """Bytes of keys and values; a policy's scores and the table of positions are not counted."""
        shape = self.context.shape
        return int(self.plan.held[length]) * shape.layers * shape.kv_heads * shape.bytes_per_token

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        on_finish: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """Completions in prompt order. RLKVError for a prompt that is empty or leaves no room."""
        run = _Run(self, checked_prompts(prompts, self.context.max_length), params)
        done: dict[int, Completion] = {}
        model = self.context.model
        training = model.training
        model.eval()
        try:
            while run.schedule.waiting or run.schedule.live:
                run.admit()
                run.arrange()
                run.decode()
                for completion in run.finished():
                    done[completion.index] = completion
                    if on_finish is not None:
                        on_finish(completion)
        finally:
            model.train(training)
        return [done[index] for index in range(len(prompts))]


class _Run:
    """One call of ``generate``."""

    def __init__(
        self, generator: EvictingGenerator, prompts: list[list[int]], params: SamplingParams
    ) -> None:
        context = generator.context
        model, shape, limit = context.model, context.shape, context.max_length
        check_positions(model, shape.context_length, limit)
        model.set_attn_implementation(NAME)
        weight = next(model.parameters())
        self._model, self._device, self._limit = model, weight.device, limit
        self._prompts, self._params, self._observer = prompts, params, generator.observer
        slots = max(1, min(context.slots, len(prompts)))
        self._pace = Pace.on_cuda(slots, graphs=False) if weight.is_cuda else Pace.on_cpu()
        self.schedule = Schedule(len(prompts), slots, limit, self._pace)
        self._state = SlotState(slots, limit, shape.layers, shape.kv_heads, self._device)
        self._ledger = Ledger(generator.plan, slots)
        longest = max(map(len, prompts), default=1)
        cells = max(longest, int(generator.plan.held.max()))
        self._cache = EvictingCache(
            shape, generator.policy, self._ledger, cells=cells, dtype=weight.dtype, device=self._device
        )
        self._keys = params.keys(len(prompts), self._device)
        evicting = replace(params, seed=params.seed + EVICTION_STREAM * (1 + context.seed))
        self._streams = evicting.keys(len(prompts), self._device)
        self._stop = self._tensor(list(params.stop_ids or end_ids(model)))

    def _tensor(self, values: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def admit(self) -> None:
        """Give free slots to waiting requests, and process their prompts up to the last token."""
        taken = sorted(self.schedule.take(), key=lambda pair: len(self._prompts[pair[0]]))
        if not taken:
            return
        for request, slot in taken:
            self.schedule.start(request, slot, len(self._prompts[request]) - 1)
            self._ledger.admit(slot, len(self._prompts[request]))
        requests, where = (self._tensor(list(part)) for part in zip(*taken, strict=True))
        self._cache.stream[where] = self._streams[requests]
        todo = [pair for pair in taken if len(self._prompts[pair[0]]) > 1]
        while todo:
            size = max(1, self._pace.prompt_tokens // len(self._prompts[todo[-1][0]]))
            todo, part = todo[:-size], todo[-size:]
            self._prefill([self._prompts[request] for request, _ in part], [slot for _, slot in part])
        prompts = [self._prompts[request] for request, _ in taken]
        start = [
            [prompt[-1] for prompt in prompts],
            [len(prompt) - 1 for prompt in prompts],
            [min(self._params.max_new_tokens, self._limit - len(prompt)) for prompt in prompts],
        ]
        self._state.admit(where, torch.cat([self._tensor(start), self._keys[requests][None]]), 1.0)

    def _prefill(self, prompts: list[list[int]], slots: list[int]) -> None:
        longest = max(map(len, prompts)) - 1
        rows = [prompt[:-1] + [0] * (longest + 1 - len(prompt)) for prompt in prompts]
        self._cache.prompt(self._tensor(slots), self._tensor([len(prompt) for prompt in prompts]))
        self._model.base_model(
            input_ids=self._tensor(rows),
            position_ids=torch.arange(longest, device=self._device).expand(len(rows), -1),
            past_key_values=self._cache,
            use_cache=True,
        )

    def arrange(self) -> None:
        """Keep the computed rows few, and slots of like length together where they attend in groups."""
        for moves in (self.schedule.shrink(), self.schedule.sort()):
            if moves:
                self._cache.move(moves)
                source, target = self._tensor([list(move) for move in moves]).unbind(1)
                self._state.move(source, target)

    def decode(self) -> None:
        """A few steps of every row, without waiting for their results."""
        spans = [(start, stop) for start, stop, _ in self.schedule.spans()]
        for _ in range(self._pace.every):
            self._step(self.schedule.rows, spans)
        self.schedule.advance()

    def _step(self, rows: int, spans: list[tuple[int, int]]) -> None:
        state = self._state
        self._ledger.step(rows)
        self._cache.step(spans, self._pace.round_columns)
        logits = self._model(
            input_ids=state.token[:rows, None],
            position_ids=state.position[:rows, None],
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]
        token, logprob = choose(logits, self._params, state.key[:rows], state.count[:rows])
        state.record(rows, token, logprob, self._stop)
        slots, kept = self._ledger.due(rows)
        if len(slots):
            self._cache.cut(slots, kept)
        if self._observer is not None:
            owners = self.schedule.owner
            self._observer(self._cache, {s: r for s in self.schedule.live if (r := owners[s]) is not None})

    def finished(self) -> Iterator[Completion]:
        active = self._state.active[: self.schedule.rows].tolist()
        slots = [slot for slot in self.schedule.live if not active[slot]]
        if not slots:
            return
        stop = set(self._stop.tolist())
        for slot, (tokens, logprobs) in zip(slots, self._state.results(slots), strict=True):
            index = self.schedule.finish(slot)
            self._ledger.finish(slot)
            if math.isnan(sum(logprobs)):
                raise RLKVError(f"eviction: NaN logits for prompt {index}; check the weights and the dtype")
            yield Completion(index, tokens, logprobs, "stop" if tokens[-1] in stop else "length")
