"""Generation on head-split paged memory: full heads hold every token, local heads only their window.

sampler = PagedSampler(model, window, slots=128, max_length=8192, kv_bytes=40 * 2**30)
sampler.generate(prompts, params, gates)           # as rlkv.sampler.Sampler
"""

from __future__ import annotations

from rlkv.paged.sampler import PagedSampler

__all__ = ["PagedSampler"]
