"""What a user should know of a training run: before its first step, and when a step went wrong."""

from __future__ import annotations

from collections.abc import Mapping

from rlkv.settings import TrainConfig
from rlkv.support import ModelShape

MASK_LOSS = 0.05  # of accuracy, from soft gates to the mask, that is worth a word


def remarks(config: TrainConfig, shape: ModelShape, steps: int, done: int) -> list[str]:
    """One line each: what will run for ``steps`` steps, and what is likely not meant."""
    gates = shape.layers * shape.kv_heads
    lines = [
        f"{shape.describe()}: {gates} gates, {steps} steps of {config.prompts_per_step} prompts x "
        f"{config.samples_per_prompt} samples, window {config.window}, "
        f"penalty gradient {config.penalty / gates:.1e} * c a gate"
    ]
    if done:
        lines.append(f"Going on after step {done}.")
    if config.deploy_window not in (None, config.window):
        lines.append(
            f"WARNING: gates trained with window {config.window} will be deployed with "
            f"{config.deploy_window}; train with window={config.deploy_window} to rank heads for that."
        )
    if config.prefill == "full":
        lines.append(
            "WARNING: prefill=full samples with full prompts, the update windows them: log-probabilities "
            "differ once gates fall (see logprob_gap)."
        )
    if not config.validation_data or not config.validate_every:
        lines.append("No validation: the last gates are kept.")
    mean_rate = (config.learning_rate + config.learning_rate_at(steps - 1, steps)) / 2
    if config.target_sparsity is not None and mean_rate * steps < 2:
        lines.append(
            f"WARNING: {steps} steps of about {mean_rate:g} can hardly bring a gate from 1 to 0 and back; "
            "target_sparsity may be missed."
        )
    return lines


def step_remarks(step: int, values: Mapping[str, float]) -> list[str]:
    """What went wrong in a step, from its metrics; a line each."""
    if not values.get("skipped_update"):
        return []
    return [f"WARNING: step {step}: its gradient is not finite, the update was skipped (see metrics.jsonl)."]


def last_remarks(values: Mapping[str, float], sparsity: float) -> list[str]:
    """What the last validation says of the mask of ``sparsity``; a line each."""
    gates, mask = values.get("validation_gates", 0.0), values.get("validation_mask", 0.0)
    if mask >= gates - MASK_LOSS:
        return []
    return [
        f"WARNING: with {sparsity:.1%} of the heads local the mask answers {mask:.1%} of the validation "
        f"problems, the soft gates {gates:.1%}: heads that are still needed are cut. Keep more heads "
        "(rlkv rank GATES max_loss=0.02 finds how many) or train longer."
    ]
