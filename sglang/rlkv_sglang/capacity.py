"""How many tokens and requests fit, in the terms of SGLang's pool configurators."""

from __future__ import annotations

from sglang.srt.model_executor.pool_configurator import MemoryPoolConfig, MemoryPoolConfigurator
from sglang.srt.runtime_context import get_schedule

from rlkv_sglang.hooks import Serving

MOST_REQUESTS = 4096  # SGLang's own limit where --max-running-requests says nothing


class HeadwisePoolConfigurator(MemoryPoolConfigurator):
    """The windows of all requests come off the budget first; what is left holds tokens of full heads.

    All ranks have the same plan and the same budget (SGLang takes the least), so they agree on both numbers.
    """

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    def calculate_pool_sizes(self, available_bytes: int, page_size: int) -> MemoryPoolConfig:
        """From a budget in bytes; RLKVError when it is too small for the windows."""
        plan, staging = self.serving.plan, self.serving.staging
        requests = get_schedule().max_running_requests
        if requests is None:
            fitting = plan.requests_for(available_bytes, self.serving.settings.mean_length, staging)
            requests = max(1, min(fitting, MOST_REQUESTS))
        self.serving.capacity = plan.capacity(available_bytes, requests, staging)
        return MemoryPoolConfig(max_total_num_tokens=self.serving.capacity.tokens)

    def calculate_pool_sizes_from_max_tokens(
        self, max_total_num_tokens: int, page_size: int
    ) -> MemoryPoolConfig:
        """From a number of tokens, where --max-total-tokens asks for fewer than fit."""
        return MemoryPoolConfig(max_total_num_tokens=max_total_num_tokens)
