"""Answers from a model in this process, with the method's own cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlkv.bench import pick_dtype
from rlkv.data import chat_tokens
from rlkv.errors import RLKVError
from rlkv.loading import load_model
from rlkv.mask import HeadMask
from rlkv.sampler import Completion, SamplingParams
from rlkv.support import check_model
from rlkv_eval.backend import Answer
from rlkv_eval.jobs import Job, Request
from rlkv_eval.methods.base import Context, Generator
from rlkv_eval.methods.eviction.plan import rounded_sparsity
from rlkv_eval.plan import Plan


class Local:
    """The model of a plan; ``model`` and ``tokenizer`` default to those that its config names."""

    def __init__(self, plan: Plan, model: Any = None, tokenizer: Any = None) -> None:
        config = plan.config
        if model is None:
            dtype = pick_dtype(config.dtype, config.device)
            model, tokenizer = load_model(plan.model, dtype, config.device)
        self.plan, self.network, self.tokenizer = plan, model, tokenizer
        self.shape = plan.gates.check(model) if plan.gates else check_model(model)
        self.model = plan.model
        self.facts: dict[str, Any] = {"shape": self.shape.to_dict()}
        device = next(model.parameters()).device
        self.machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.shared: dict[str, Any] = {}  # the sampler's memory, among others: one for all jobs
        self.tokens: dict[str, dict[str, list[int]]] = {}

    def encoded(self, job: Job) -> dict[str, list[int]]:
        """Problem id -> prompt tokens, chat template applied; of the prompts that leave room to answer."""
        if job.task.name not in self.tokens:
            found = {item.id: chat_tokens(self.tokenizer, item.prompt)[0] for item in job.items}
            longest = max(map(len, found.values()))
            limit = min(self.shape.context_length // 2 or longest, (job.task.max_length or longest + 1) - 1)
            kept = {name: tokens for name, tokens in found.items() if len(tokens) <= limit}
            why = f"prompts (up to {longest} tokens) leave no room: the model and the task allow {limit}"
            if not kept:
                raise RLKVError(f"task {job.task.name}: all {len(found)} {why}")
            if len(kept) < len(found):
                print(f"{job.task.name}: SKIPPED {len(found) - len(kept)} of {len(found)} {why}")
            self.tokens[job.task.name] = kept
        return self.tokens[job.task.name]

    def skipped(self, job: Job) -> list[str]:
        """Ids of problems whose prompt takes more than half the model's context."""
        kept = self.encoded(job)
        return [item.id for item in job.items if item.id not in kept]

    def open(self, job: Job) -> LocalSession:
        """Build the job's generator; a method may compute its scores here."""
        plan, config = self.plan, self.plan.config
        tokens = self.encoded(job)
        longest = max(map(len, tokens.values())) + plan.max_new_tokens(job)
        limits = (longest, job.task.max_length or longest, self.shape.context_length or longest)
        context = Context(
            model=self.network,
            tokenizer=self.tokenizer,
            window=plan.window,
            prefill=config.prefill,
            slots=config.slots,
            max_length=min(limits),
            seed=config.seed,
            gates=plan.gates,
            calibration=plan.calibration,
            work=plan.work,
            shared=self.shared,
        )
        context.work.mkdir(parents=True, exist_ok=True)
        generator = job.make_method().build(context, job.sparsity)
        params = SamplingParams(
            max_new_tokens=plan.max_new_tokens(job),
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=plan.sampling_seed(job),
        )
        mask = generator.mask
        sparsity = rounded_sparsity(job.sparsity, self.shape) if mask is None else mask.sparsity
        per_token = self.shape.layers * self.shape.kv_heads * self.shape.bytes_per_token
        return LocalSession(generator, params, self.tokenizer, tokens, per_token, mask, sparsity)


@dataclass
class LocalSession:
    """One method at one sparsity on one task's prompts."""

    generator: Generator
    params: SamplingParams
    tokenizer: Any
    tokens: dict[str, list[int]]
    full_bytes_per_token: int
    mask: HeadMask | None
    true_sparsity: float

    def answer(self, requests: Sequence[Request], on_answer: Callable[[Answer], None]) -> None:
        """Generate for all requests in one batch that refills itself."""
        prompts = [self.tokens[request.item.id] for request in requests]
        params = replace(self.params, streams=tuple(request.stream for request in requests))

        def finish(completion: Completion) -> None:
            tokens = completion.tokens[:-1] if completion.finish == "stop" else completion.tokens
            length = len(prompts[completion.index]) + len(completion.tokens)
            on_answer(
                Answer(
                    requests[completion.index],
                    self.tokenizer.decode(tokens, skip_special_tokens=False),
                    completion.finish,
                    len(prompts[completion.index]),
                    len(completion.tokens),
                    self.generator.kv_bytes(length),
                    length * self.full_bytes_per_token,
                )
            )

        self.generator.generate(prompts, params, on_finish=finish)
