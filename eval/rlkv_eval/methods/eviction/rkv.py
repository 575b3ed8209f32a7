"""R-KV: keep tokens that the last queries attend to and whose keys do not repeat others (not our RLKV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from rlkv.errors import RLKVError
from rlkv_eval.methods.base import Context
from rlkv_eval.methods.eviction.generator import EvictingGenerator
from rlkv_eval.methods.eviction.plan import Plan, rounded_sparsity
from rlkv_eval.methods.eviction.policy import Policy, View

SIMILARITIES_AT_ONCE = 2**26  # in float32


@dataclass(frozen=True)
class RKV:
    """Cai et al. 2025, the rule of the official code (github.com/Zefan-Cai/R-KV), over the whole cache.

    Now and then (``buffer``) the tokens of lowest ``mix * importance - (1 - mix) * redundancy`` go.
    Importance: softmax of the last ``observed`` queries' scores, each the largest of the query heads that
    share the KV head, over all tokens before these; averaged over the queries; largest of ``pool``
    neighbours. Redundancy: softmax over tokens of the mean cosine similarity of the other keys to it,
    except that each key spares the latest key more similar than ``similar`` (none: the first of the cache).
    The ``observed`` newest tokens stay.

    The official code drops ``buffer`` = 128 tokens whenever budget + 128 are held. Here both fit into the
    one budget: a turn is ``share`` of it, at most ``buffer`` tokens; what is held never exceeds the budget
    and reaches it just before a cut. The importance of each query is taken as it comes, so that no queries
    are stored. RLKV's authors compared with another rule: only the last 512 tokens were candidates, which
    eats the end of a long prompt, keys were found at renumbered positions, and 512 tokens were always held.
    """

    observed: int = 8
    pool: int = 7
    mix: float = 0.1
    similar: float = 0.5
    buffer: int = 128
    share: float = 0.125

    name: ClassVar[str] = "rkv"
    title: ClassVar[str] = "R-KV"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.24133"

    def __post_init__(self) -> None:
        if self.observed < 1 or self.buffer < self.observed:
            raise RLKVError(
                f"rkv: needs observed >= 1 and buffer >= observed, got {self.observed} and {self.buffer}"
            )
        if self.pool < 1 or self.pool % 2 == 0:
            raise RLKVError(f"rkv: pool is an odd number of tokens, got {self.pool}")
        if not (0 <= self.mix <= 1 and 0 <= self.share <= 0.5):
            raise RLKVError(
                f"rkv: mix lies within [0, 1] and share within [0, 0.5], got {self.mix}, {self.share}"
            )

    def build(self, context: Context, sparsity: float) -> EvictingGenerator:
        """RLKVError for a sparsity outside [0, 1]."""
        plan = Plan.in_turns(
            rounded_sparsity(sparsity, context.shape),
            context.window,
            context.max_length,
            buffer=self.buffer,
            share=self.share,
            observed=self.observed,
        )
        device = next(context.model.parameters()).device
        policy = RedundancyAware(self, torch.from_numpy(plan.age).to(device))
        return EvictingGenerator(self.name, context, plan, policy)


class RedundancyAware(Policy):
    """Scores are importance, summed over the queries that observe. ``age``: the plan's, int64 by length."""

    def __init__(self, rule: RKV, age: torch.Tensor) -> None:
        self.rule, self.age = rule, age

    def _age(self, view: View) -> torch.Tensor:
        """Int64 [n, 1, 1]: how many queries have observed, this one included; 0 where it doesn't."""
        in_prompt = view.length.clamp(max=self.rule.observed)
        return torch.where(view.length == view.prompt, in_prompt, self.age[view.length])

    def see_prompt(
        self, query: torch.Tensor, key: torch.Tensor, lengths: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Of the prompt's last queries but one."""
        slots, heads, count, dim = key.shape
        observed = lengths.clamp(max=self.rule.observed)[:, None]  # [n, 1], of each prompt
        first = lengths[:, None] - observed  # tokens before the observing ones
        place = first + torch.arange(self.rule.observed - 1, device=key.device)  # [n, observing queries]
        used = place < lengths[:, None] - 1
        index = place.clamp(max=count - 1)[:, None, :, None].expand(-1, query.shape[1], -1, dim)
        asking = query.gather(2, index).view(slots, heads, -1, index.shape[2], dim) * scaling
        scores = torch.matmul(asking, key[:, :, None].transpose(3, 4)).amax(2)  # [n, H, queries, T]
        past = torch.arange(count, device=key.device) < first  # [n, T]
        weights = _softmax_over(scores, past[:, None, None])
        return (weights * used[:, None, :, None]).sum(2)

    def see_step(self, view: View, scores: torch.Tensor, weights: torch.Tensor) -> None:
        age = self._age(view)
        cell = torch.arange(scores.shape[-1], device=scores.device)
        importance = _softmax_over(scores.amax(2), cell < view.held - age)
        # a new observation forgets the last one; where none goes on, the score is left as it was
        view.score.mul_(age != 1).add_(importance * (age > 0))

    def priority(self, view: View) -> torch.Tensor:
        rule, age = self.rule, self._age(view)
        filled = ~view.empty
        recent = view.newest(age)
        importance = (view.score / age.clamp(min=1)).masked_fill(recent | view.empty, 0)
        importance = F.max_pool1d(importance, rule.pool, stride=1, padding=rule.pool // 2)
        past = rule.mix * importance - (1 - rule.mix) * self._redundancy(view.keys, filled, view.held)
        newest_last = 2 + view.positions / view.length  # above every other, should not even these all fit
        return torch.where(recent, newest_last, past)

    def _redundancy(self, keys: torch.Tensor, filled: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """keys [n, H, D, C] in order of time, ``filled`` bool [n, 1, C] -> float32 [n, H, C]."""
        keys = F.normalize(keys.float(), dim=2, eps=1e-8).masked_fill(~filled[:, :, None], 0)
        count = keys.shape[-1]
        cell = torch.arange(count, device=keys.device, dtype=torch.int32)
        total = torch.zeros_like(keys[:, :, 0])
        block = max(1, SIMILARITIES_AT_ONCE // total.numel())
        for first in range(0, count, block):
            similarity = torch.matmul(keys[..., first : first + block].transpose(2, 3), keys)
            similarity.diagonal(first, dim1=-2, dim2=-1).zero_()
            latest = (cell * (similarity > self.rule.similar)).amax(-1, keepdim=True)
            similarity.scatter_(-1, latest.long(), 0.0)
            total += similarity.sum(-2)
        return _softmax_over(total / held, filled)


def _softmax_over(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Softmax in float32 over the allowed last indices; 0 elsewhere, and everywhere where none is allowed."""
    scores = scores.float().masked_fill(~allowed, torch.finfo(torch.float32).min)
    return torch.softmax(scores, dim=-1).masked_fill(~allowed, 0)
