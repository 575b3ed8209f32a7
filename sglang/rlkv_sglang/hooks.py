"""The hooks: each wraps one function of SGLang, whose original comes first among its arguments.

``Serving`` carries the plan from where the model's config is read to wherever it is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rlkv.errors import RLKVError
from rlkv.serving.extend import Chunk
from rlkv.serving.plan import Capacity, Plan
from rlkv.serving.report import describe, describe_capacity
from rlkv.serving.slots import Slots
from rlkv.serving.weights import missing, permuted
from rlkv.support import check_model
from rlkv_sglang.refusals import check_backend, check_options, check_prefill_graphs, check_quantization
from rlkv_sglang.settings import Settings

logger = logging.getLogger(__name__)

Original = Callable[..., Any]


@dataclass
class Serving:
    """What one model is served with; None in its place means stock SGLang."""

    settings: Settings
    plan: Plan
    chunked: bool  # prompts may be processed in chunks
    capacity: Capacity | None = None  # of the memory profile, before any limit of the user's
    gates: torch.Tensor | None = None  # of the mode mixed: [layers, kv_heads] of all ranks
    permuted: set[str] = field(default_factory=set)  # names of the checkpoint's tensors, as they load

    @property
    def mixed(self) -> bool:
        return self.settings.mode == "mixed"

    @property
    def staging(self) -> int:
        """Tokens of the longest prompt that can be processed in chunks."""
        return self.plan.staging(self.settings.prompt_tokens) if self.chunked else 0

    def slots(self, requests: int) -> Slots:
        return Slots(self.plan.window, requests, self.staging)


_prompt_limit: int | None = None  # of this scheduler process


def server_args(original: Original, args: Any) -> None:
    """Take the name ``rlkv`` out of the arguments, put SGLang's own backend in, and refuse what can't be."""
    if args.attention_backend != "rlkv":
        return original(args)
    settings = Settings.read()
    if settings.idle:
        args.attention_backend = settings.backend or None
        return original(args)
    from rlkv_sglang.plugin import check_installed

    check_installed()
    check_options(args, mixed=settings.mode == "mixed")
    if not args.disable_radix_cache:
        logger.warning("rlkv: radix cache off; the windows of a cached prefix would be lost")
        args.disable_radix_cache = True
    args.disable_prefill_cuda_graph = True
    args.rlkv = settings  # travels to the other processes with the arguments
    args.attention_backend = settings.backend or _backend_of_machine(args.device)
    original(args)
    check_options(args, mixed=settings.mode == "mixed")
    check_backend(args.attention_backend)
    check_prefill_graphs(args)


def _backend_of_machine(device: str | None) -> str:
    if device == "cpu" or not torch.cuda.is_available():
        return "torch_native"
    return "fa3" if torch.cuda.get_device_capability()[0] == 9 else "triton"


def model_config(original: Original, args: Any, *rest: Any, **options: Any) -> Any:
    """Make the plan as soon as the model's config is there."""
    config = original(args, *rest, **options)
    settings: Settings | None = getattr(args, "rlkv", None)
    config.rlkv = None
    if settings is None:
        return config
    if settings.mode != "mixed":
        check_quantization(config.quantization)
    shape = replace(check_model(config.hf_config), context_length=config.context_len)
    plan = settings.plan(shape, args.tp_size, config.dtype.itemsize)
    if plan.compresses or settings.mode == "mixed":
        config.rlkv = Serving(settings, plan, chunked=(args.chunked_prefill_size or 0) > 0)
    return config


def serving_of(holder: Any) -> Serving | None:
    """Of a model runner or a KV cache configurator, or a model config."""
    config = getattr(holder, "model_config", holder)
    return getattr(config, "rlkv", None)


def initialize_model(original: Original, config: Any, *rest: Any, **options: Any) -> Any:
    """The model, with a ``load_weights`` that permutes heads, now and for every later update."""
    model = original(config, *rest, **options)
    serving = serving_of(config)
    if serving is None:
        return model
    load, plan = model.load_weights, serving.plan
    if serving.mixed:
        from rlkv_sglang.mixed import make_gates, without_gates

        # a buffer, since SGLang keeps buffers while it gives the memory of weights away
        model.register_buffer("rlkv_gates", make_gates(serving), persistent=False)
        serving.gates = model.rlkv_gates
        model.load_weights = lambda weights, *a, **k: load(without_gates(serving, weights), *a, **k)
        return model
    names = serving.permuted
    model.load_weights = lambda weights, *a, **k: load(permuted(plan, weights, names), *a, **k)
    logger.info("rlkv: %s", describe(plan).replace("\n", "; "))
    return model


def pool_configurator(original: Original, configurator: Any) -> Any:
    """How many tokens fit: those of full heads, beside the windows of all requests."""
    serving = serving_of(configurator)
    if serving is None or serving.mixed:
        return original(configurator)
    from rlkv_sglang.capacity import HeadwisePoolConfigurator

    return HeadwisePoolConfigurator(serving)


def max_requests(original: Original, configurator: Any, tokens: int) -> int:
    """No more requests than have been given a window."""
    most: int = original(configurator, tokens)
    serving = serving_of(configurator)
    if serving is None or serving.capacity is None:
        return most
    return min(most, serving.capacity.requests)


def kv_pool(original: Original, configurator: Any, **options: Any) -> Any:
    """The KV pool: full heads by token, local heads by request."""
    serving = serving_of(configurator)
    if serving is None or serving.mixed:
        return original(configurator, **options)
    from rlkv_sglang.pool import build_pool

    slots = serving.slots(options["req_to_token_pool"].size)
    pool = build_pool(configurator, serving, slots, options["sizes"].max_total_num_tokens)
    global _prompt_limit
    _prompt_limit = serving.staging or None
    logger.info("rlkv: %s", describe_capacity(serving.plan, pool.capacity()))
    return pool


def attention_backend(original: Original, *, model_runner: Any, **options: Any) -> Any:
    """SGLang's backend for full heads, taught to treat local heads."""
    backend = original(model_runner=model_runner, **options)
    serving = serving_of(model_runner)
    if serving is None:
        return backend
    if serving.mixed:
        from rlkv_sglang.mixed import teach_gates

        return teach_gates(backend, model_runner, serving)
    if model_runner.server_args.load_format != "dummy":
        check_loaded(serving)
    from rlkv_sglang.backend import teach_heads

    return teach_heads(backend, model_runner, serving)


def check_loaded(serving: Serving) -> None:
    """Raise RLKVError if the model has weights that did not pass the permutation."""
    unmoved = missing(serving.plan, serving.permuted)
    if unmoved:
        raise RLKVError(
            f"attention backend rlkv: heads of {unmoved[0]} ({len(unmoved)} projections in all) were not "
            "permuted while weights were loaded: this checkpoint, or this way to load it, is not supported"
        )


def forward_batch(original: Original, cls: Any, batch: Any, runner: Any, **options: Any) -> Any:
    """Tell the backend of each request's slot, new tokens and prompt, which SGLang's batch does not."""
    result = original(cls, batch, runner, **options)
    serving = serving_of(runner)
    if serving is None or not batch.forward_mode.is_extend():
        return result
    full = serving.plan.prefill == "full"
    requests = zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True)
    runner.attn_backend.expect(
        [
            Chunk(r.rid, r.req_pool_idx, start, start + count, len(r.origin_input_ids) if full else 0)
            for r, start, count in requests
        ]
    )
    return result


def fused_kv_store(original: Original, *args: Any, **options: Any) -> bool:
    """Rotary kernels that also store keys write all heads of a layer to one place; ours have two."""
    from sglang.srt.model_executor.forward_context import get_token_to_kv_pool

    from rlkv_sglang.pool import HeadwiseKVPool

    return not isinstance(get_token_to_kv_pool(), HeadwiseKVPool) and original(*args, **options)


def input_length(original: Original, req: Any, *rest: Any, **options: Any) -> str | None:
    """Refuse a prompt that could not be processed in chunks."""
    error: str | None = original(req, *rest, **options)
    if error is None and _prompt_limit is not None and len(req.origin_input_ids) > _prompt_limit:
        return (
            f"The prompt has {len(req.origin_input_ids)} tokens; with prefill full at most {_prompt_limit} "
            "can be processed: raise RLKV_PROMPT_TOKENS, or use RLKV_PREFILL=local"
        )
    return error
