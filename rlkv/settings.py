"""The settings of a training run; the defaults are the paper's recipe for Llama-8B (Table 5, scripts)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from rlkv.errors import RLKVError
from rlkv.window import Window


@dataclass
class TrainConfig:
    """What ``rlkv train`` takes; lengths are in tokens."""

    # What
    model: str = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"  # hub id, local folder, or pocket
    output: str = "gates/run"  # folder for gates, card, metrics, checkpoints
    data: str = "Kurt232/Sampled-Laser-Dataset-V4"  # hub id, .jsonl path, or pocket:resolve+search+ledger
    data_split: str = "train"  # of a hub dataset or of the pocket
    data_limit: int = 0  # use the first so many problems (0: all; the pocket makes 1024)
    validation_data: str = ""  # held-out prompts (empty: none)
    validation_split: str = "test"  # of a hub dataset or of the pocket (train, dev or test)
    prompt_column: str = "prompt"  # column of the user's message
    answer_column: str = "answer"  # column of the gold answer
    prompt_template: str = "{prompt}"  # wraps the prompt column
    reward: str = "math"  # math, exact or module.path:function

    initial_gates: str = ""  # gates folder or table to start from (empty: ones, the paper)

    # Mixed attention
    window: Window = Window(128, 256)  # sink+recent tokens of a local head in training
    deploy_window: Window | None = None  # the window to be deployed, if another: validation uses it
    prefill: Literal["local", "full"] = (
        "local"  # local heads see a windowed prompt (local, as the trainer does) or all of it (full)
    )

    # Rollout
    max_prompt_tokens: int = 512  # longer prompts are skipped, and counted
    max_new_tokens: int = 7168  # the authors' scripts; the paper says 8192 in all, and a cut answer scores 0
    temperature: float = 1.0  # of sampled, proximal and new log-probabilities alike
    top_p: float = 1.0  # nucleus
    top_k: int = 0  # 0: off
    prompts_per_step: int = 32  # prompts a batch
    samples_per_prompt: int = 4  # answers sampled for each prompt
    slots: int = 32  # answers being written at the same time
    kv_gib: float = 0.0  # GiB of pages for their keys and values (0: no pages, each has room for the longest)

    # Objective
    estimator: Literal["soft", "masks"] = (
        "soft"  # gradient through mixed attention (paper), or REINFORCE on a sampled mask for each answer
    )
    advantage: Literal["group", "batch"] = (
        "group"  # group (paper: within a prompt) or batch (authors' code: over the batch's tokens)
    )
    clip: float = 0.4  # ratio clipped to 1 +- clip
    weight_cap: float = 5.0  # tokens whose behaviour weight exceeds this are dropped
    penalty: float = (
        1e-3  # beta of beta * c(reward) * mean gate; each gate feels beta * c / (layers * KV heads)
    )
    tau: float = 0.5  # no penalty while the mean reward is not above this
    penalty_reward: Literal["mean", "worst_task"] = (
        "mean"  # the reward that c and tau look at: the batch's mean (paper), or that of its worst task
    )
    target_sparsity: float | None = None  # steer the penalty until this fraction of gates lies below 0.5

    # Optimiser
    epochs: int = 2  # passes over the prompts (when steps is 0)
    steps: int = 0  # batches (0: as many as the epochs hold)
    learning_rate: float = 1e-2  # AdamW on the gates, float32
    final_learning_rate: float | None = None  # falls to this in a straight line (none: constant, the paper)
    beta1: float = 0.9  # AdamW
    beta2: float = 0.999  # AdamW
    weight_decay: float = 0.017  # AdamW, decoupled
    max_grad_norm: float = 1.0  # over all gates
    minibatches_per_batch: int = 1  # optimiser steps a batch
    max_tokens_per_microbatch: int = 7680  # padded tokens in one forward (at least one answer)
    gradient_checkpointing: bool = False  # less memory, one more forward

    # Validation and stopping
    validate_every: int = 20  # steps (0: never)
    validation_prompts: int = 64  # held-out prompts answered greedily, once by the gates and once by the mask
    eval_sparsity: float = 0.5  # of the validated mask (target_sparsity, if set, takes its place)
    keep: Literal["best", "last"] = "best"  # the gates to write: best (by validation) or last
    patience: int = 0  # stop after so many validations without a better one (0: never)

    # Running
    seed: int = 1  # of prompt order and sampling
    dtype: Literal["bfloat16", "float32"] = (
        "bfloat16"  # of the model: bfloat16 or float32 (the gates are float32 always)
    )
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    resume: bool = False  # go on from the last checkpoint in the output folder, if there is one
    checkpoint_every: int = 1  # steps; a checkpoint holds a few kilobytes
    keep_checkpoints: int = 2  # how many
    tensorboard: bool = True  # curves under output/tensorboard, if the package is there

    def check(self) -> None:
        """Raise RLKVError for a value that cannot be meant."""
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise RLKVError(f"{name} must be a finite number, got {value}")
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                raise RLKVError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise RLKVError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name, kind in get_type_hints(type(self)).items():
            value, allowed = getattr(self, name), get_args(kind)
            if allowed and isinstance(allowed[0], str) and value not in allowed:
                raise RLKVError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise RLKVError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.top_p > 1:
            raise RLKVError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.final_learning_rate is not None and self.final_learning_rate < 0:
            raise RLKVError(f"final_learning_rate must be 0 or more, got {self.final_learning_rate}")
        if not 0 <= self.eval_sparsity <= 1:
            raise RLKVError(f"eval_sparsity must lie in [0, 1], got {self.eval_sparsity}")
        if self.patience and not (self.validation_data and self.validate_every):
            raise RLKVError(
                "patience counts validations: give validation_data and validate_every, or patience=0"
            )
        if self.advantage == "group" and self.samples_per_prompt < 2:
            raise RLKVError(
                "advantage group compares a prompt's samples: samples_per_prompt must be 2 or more"
            )
        if self.estimator == "masks" and (self.samples_per_prompt < 2 or self.minibatches_per_batch > 1):
            raise RLKVError(
                "estimator masks compares a prompt's samples and makes one update a batch: "
                "samples_per_prompt must be 2 or more and minibatches_per_batch 1"
            )
        if self.minibatches_per_batch > self.prompts_per_step:
            raise RLKVError("minibatches_per_batch cannot exceed prompts_per_step")

    def learning_rate_at(self, step: int, steps: int) -> float:
        """The learning rate of step number ``step`` (from 0) of ``steps``."""
        if self.final_learning_rate is None or steps < 2:
            return self.learning_rate
        return self.learning_rate + (self.final_learning_rate - self.learning_rate) * step / (steps - 1)

    @property
    def validated_sparsity(self) -> float:
        """The sparsity of the mask that validation answers with."""
        return self.eval_sparsity if self.target_sparsity is None else self.target_sparsity


POSITIVE = (
    "max_prompt_tokens",
    "max_new_tokens",
    "temperature",
    "top_p",
    "prompts_per_step",
    "samples_per_prompt",
    "slots",
    "clip",
    "weight_cap",
    "learning_rate",
    "max_grad_norm",
    "minibatches_per_batch",
    "max_tokens_per_microbatch",
    "validation_prompts",
    "checkpoint_every",
    "keep_checkpoints",
)
NOT_NEGATIVE = (
    "data_limit",
    "kv_gib",
    "top_k",
    "penalty",
    "epochs",
    "steps",
    "weight_decay",
    "validate_every",
    "patience",
)
