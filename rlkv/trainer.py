"""RL on head gates: sample with the current gates, grade, update the gates, and never lose a step.

    gates = train(TrainConfig(model="pocket", data="pocket:resolve", output="gates/pocket"))

The output folder holds gates.tsv and card.json (the gates to use), config.yaml, metrics.jsonl, tensorboard/,
checkpoints/ and, where they differ, last/ (the final gates when the best ones are kept).
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rlkv import checkpoint
from rlkv.config import plain
from rlkv.config import save as save_config
from rlkv.data import Encoded, PromptSet
from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.learner import Learner, Sample
from rlkv.loading import load_model, pick_device, recompute_activations
from rlkv.logprobs import on_kernels
from rlkv.mask_learner import MaskLearner
from rlkv.metrics import Metrics, Progress
from rlkv.penalty import Penalty, gate_sparsity
from rlkv.remarks import last_remarks, remarks, step_remarks
from rlkv.rewards import get_reward
from rlkv.rollout import Actor, make_sampler, summary
from rlkv.run_folder import checkpoints, last_state, write_gates
from rlkv.sampler import SamplingParams
from rlkv.settings import TrainConfig
from rlkv.support import check_model
from rlkv.validation import Best, Validator

__all__ = ["TrainConfig", "Trainer", "train"]


def train(config: TrainConfig, model: Any = None, tokenizer: Any = None) -> HeadGates:
    """Train gates as ``config`` says and write them; returns the gates kept (``config.keep``).

    ``model`` and ``tokenizer`` default to those that ``config`` names. Ctrl-C saves a checkpoint, says where,
    and passes through. Raises RLKVError for bad settings or input, before anything is sampled.
    """
    return Trainer(config, model, tokenizer).run()


class Trainer:
    """A run: everything is set up, and checked, on construction."""

    def __init__(self, config: TrainConfig, model: Any = None, tokenizer: Any = None) -> None:
        config.check()
        self.config, self.folder = config, Path(config.output)
        reward = get_reward(config.reward)
        state = last_state(config)
        if (model is None) != (tokenizer is None):
            raise RLKVError("train: give both model and tokenizer, or neither")
        if model is None:
            model, tokenizer = load_model(config.model, config.dtype, config.device)
        elif config.device != "auto":
            model = model.to(pick_device(config.device))
        self.model = model.eval().requires_grad_(False)
        self.shape = check_model(model)
        prompts = self.read(tokenizer, config.data, config.data_split, config.data_limit)
        if len(prompts) < config.prompts_per_step:
            raise RLKVError(
                f"{config.data}: {len(prompts)} usable prompts, fewer than "
                f"prompts_per_step={config.prompts_per_step}"
            )
        self.per_epoch = len(prompts) // config.prompts_per_step
        self.steps = config.steps or self.per_epoch * config.epochs
        longest = config.max_prompt_tokens + config.max_new_tokens
        if self.shape.context_length and longest > self.shape.context_length:
            raise RLKVError(
                f"max_prompt_tokens + max_new_tokens = {longest} exceeds the model's context of "
                f"{self.shape.context_length} tokens"
            )
        if config.gradient_checkpointing:
            recompute_activations(model)
        sampler = make_sampler(model, config, longest)
        self.actor = Actor(sampler, tokenizer, prompts, reward)
        self.validator: Validator | None = None
        if config.validation_data and config.validate_every:
            held_out = self.read(
                tokenizer, config.validation_data, config.validation_split, config.validation_prompts
            )
            self.validator = Validator(Actor(sampler, tokenizer, held_out, reward), config)
        penalty = Penalty(config.penalty, config.tau, config.target_sparsity, self.steps)
        start = torch.ones(self.shape.layers, self.shape.kv_heads)
        if config.initial_gates:
            start = HeadGates.load(config.initial_gates, model=model).values
        self.learner: Learner | MaskLearner
        if config.estimator == "masks":
            self.learner = MaskLearner(start, config, penalty)
        else:
            self.learner = Learner(model, start, config, penalty)
        self.best: Best | None = None
        self.done, self.since_best, self.last_reward = 0, 0, 0.0
        if state is not None:
            self.restore(state)
        self.metrics_bytes = 0 if state is None else state["metrics_bytes"]

    def read(self, tokenizer: Any, spec: str, split: str, limit: int) -> Encoded:
        config = self.config
        found = PromptSet.from_spec(
            spec,
            split,
            limit,
            config.seed,
            prompt=config.prompt_column,
            answer=config.answer_column,
            template=config.prompt_template,
        )
        return found.encode(tokenizer, config.max_prompt_tokens)

    def run(self) -> HeadGates:
        """The loop."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_config(self.config, self.folder / "config.yaml")
        metrics = Metrics(self.folder, self.done, self.metrics_bytes, self.config.tensorboard)
        progress = Progress(self.steps, self.done)
        for line in remarks(self.config, self.shape, self.steps, self.done, on_kernels(self.model)):
            progress.say(line)
        state = self.state(metrics.bytes)
        try:
            while self.done < self.steps and not self.enough():
                values = self.step()
                metrics.log(self.done, values)
                state = self.state(metrics.bytes)
                progress.advance(values)
                for line in step_remarks(self.done, values):
                    progress.say(line)
                if self.done == self.steps:
                    for line in last_remarks(values, self.config.validated_sparsity):
                        progress.say(line)
                if self.done % self.config.checkpoint_every == 0:
                    self.save(state)
        except KeyboardInterrupt:
            # ``state`` is that of the last finished step: what the broken one did is dropped
            path = self.save(state)
            progress.say(
                f"Stopped after step {state['step']} of {self.steps}, saved in {path}: "
                "give the same command with resume=true to go on."
            )
            raise
        finally:
            progress.close()
            metrics.close()
        self.save(state)
        return self.finish()

    def step(self) -> dict[str, float]:
        """One batch: sample, grade, update; every ``validate_every`` steps and at the end, validate."""
        config, began = self.config, time.perf_counter()
        epoch, place = divmod(self.done, self.per_epoch)
        start = place * config.prompts_per_step
        which = self.actor.prompts.order(epoch, config.seed)[start : start + config.prompts_per_step]
        params = SamplingParams(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=config.seed * 1_000_003 + self.done,
        )
        gates = self.learner.gates.detach()
        samples = self.answer(which, params, gates)
        sampled = time.perf_counter()
        values = summary(samples)
        values |= self.learner.update(samples, self.done)
        trained = time.perf_counter()
        self.done += 1
        self.last_reward = values["reward"]
        answered = sum(len(sample.response) for group in samples for sample in group)
        learned = values["trained_fraction"] * sum(len(sample) for group in samples for sample in group)
        values |= {
            "gate_mean": gates.mean().item(),
            "sparsity": gate_sparsity(gates),
            "beta": self.learner.penalty.effective_beta,
            "rollout_tokens_per_second": answered / (sampled - began),
            "train_tokens_per_second": learned / (trained - sampled),
        }
        if self.validator and (self.done % config.validate_every == 0 or self.done == self.steps):
            values |= self.validate(self.validator)
        return {**values, "seconds": time.perf_counter() - began}

    def answer(self, which: list[int], params: SamplingParams, gates: torch.Tensor) -> list[list[Sample]]:
        """Graded answers under the gates, or each under a mask drawn from them."""
        count = self.config.samples_per_prompt
        if isinstance(self.learner, Learner):
            return self.actor.answer(which, params, gates, count)
        masks = self.learner.draw(len(which) * count, params.seed)
        samples = self.actor.answer(which, params, masks, count)
        for sample, mask in zip((sample for group in samples for sample in group), masks, strict=True):
            sample.mask = mask
        return samples

    def validate(self, validator: Validator) -> dict[str, float]:
        """Answer the held-out prompts, and keep the gates if they are the best so far."""
        gates = self.learner.gates.detach().cpu()
        values = validator.accuracy(gates)
        better = validator.better(self.best, gates, values, self.done)
        self.since_best = 0 if better else self.since_best + 1
        self.best = better or self.best
        return values

    def enough(self) -> bool:
        return 0 < self.config.patience <= self.since_best

    def state(self, metrics_bytes: int) -> dict[str, Any]:
        """Everything that a resumed run needs (the data position is a function of the step)."""
        return {
            "step": self.done,
            "learner": self.learner.state_dict(),
            "penalty": self.learner.penalty.state_dict(),
            "best": self.best and asdict(self.best),
            "since_best": self.since_best,
            "last_reward": self.last_reward,
            "random": checkpoint.random_states(),
            "metrics_bytes": metrics_bytes,
            "config": plain(self.config),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.done, self.since_best, self.last_reward = (
            state["step"],
            state["since_best"],
            state["last_reward"],
        )
        self.best = Best(**state["best"]) if state["best"] else None
        self.learner.load_state_dict(state["learner"])
        self.learner.penalty.load_state_dict(state["penalty"])
        checkpoint.restore_random_states(state["random"])

    def save(self, state: dict[str, Any]) -> Path:
        return checkpoint.save(checkpoints(self.config), state["step"], state, self.config.keep_checkpoints)

    def finish(self) -> HeadGates:
        """Write the kept gates with their card (and the last ones apart, if others are kept)."""
        facts = {"reward": self.last_reward, "validation_mask": self.best.key[1] if self.best else None}
        last = self.learner.gates.detach().cpu()
        if self.config.keep == "last" or self.best is None:
            return write_gates(self.folder, last, self.shape, self.config, self.done, **facts)
        write_gates(self.folder / "last", last, self.shape, self.config, self.done, reward=self.last_reward)
        return write_gates(self.folder, self.best.gates, self.shape, self.config, self.best.step, **facts)
