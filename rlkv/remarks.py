"""What a user should know of a training run: before its first step, and when a step went wrong."""

from __future__ import annotations

from collections.abc import Mapping

from rlkv.settings import TrainConfig
from rlkv.support import ModelShape

MASK_LOSS = 0.05  # of accuracy, from soft gates to the mask, that is worth a word
KEPT = 30  # numbers a layer, token and unit of width that transformers' forward keeps for the backward pass
MUCH = 32  # GiB of them that are worth a word


def remarks(
    config: TrainConfig, shape: ModelShape, steps: int, done: int, on_kernels: bool = True
) -> list[str]:
    """One line each: what will run for ``steps`` steps, and what is likely not meant.

    ``on_kernels``: as :func:`rlkv.logprobs.on_kernels` says of the model.
    """
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
    if not (on_kernels or config.gradient_checkpointing or config.estimator == "masks"):
        width = shape.query_heads * shape.head_dim * shape.layers * shape.bytes_per_value
        gib = KEPT * width * config.max_tokens_per_microbatch / 2**30
        if gib >= MUCH:
            lines.append(
                f"WARNING: updates go through transformers' forward and keep about {gib:.0f} GiB of "
                f"activations, of {config.max_tokens_per_microbatch} tokens at once: "
                "gradient_checkpointing=true or a smaller max_tokens_per_microbatch takes less memory."
            )
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
