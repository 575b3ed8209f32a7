"""What a user should know before the first step of a training run."""

from __future__ import annotations

from rlkv.settings import TrainConfig
from rlkv.support import ModelShape


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
    if config.target_sparsity is not None and mean_rate * steps < 1:
        lines.append(
            f"WARNING: {steps} steps of about {mean_rate:g} can hardly bring a gate from 1 to 0; "
            "target_sparsity may be missed."
        )
    return lines
