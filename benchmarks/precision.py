"""What 16 bits cost: gradients of the gates and log-probabilities in bf16, each against float32 on the GPU.

    python benchmarks/precision.py --json precision.json

The weights of a random Llama-8B, rounded to bf16, are the same in both. (1) The gradient of an answer's mean
log-probability, and of the policy loss, with respect to the gates: by the trainer's forward on our kernels,
by transformers' forward with the same attention kernel, and by transformers' forward with PyTorch's fused or
eager attention in bf16.
(2) Log-probabilities of sampled answers: the paged sampler's own, the trainer's, and transformers' (sdpa and
eager). The same for the pocket reasoner, a trained model. About 60 s, 60 GiB.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import card, print_table, relative_error, write_json
from random_llama import random_llama
from train_check import transformers_forward

from rlkv import pocket
from rlkv.attention import NAME, Mixed
from rlkv.loading import recompute_activations
from rlkv.logprobs import response_logprobs
from rlkv.objective import policy_loss
from rlkv.paged import PagedSampler
from rlkv.sampler import SamplingParams
from rlkv.window import Window

Rows = list[tuple[list[int], list[int]]]


def gradient(
    model: Any, rows: Rows, gates: torch.Tensor, window: Window, path: str, weighted: bool
) -> list[torch.Tensor]:
    """(gradient of the mean log-probability [layers, kv_heads], log-probabilities), float32 on the CPU.

    ``weighted``: of the policy loss instead, for answers drawn uniformly from the vocabulary.
    """
    gates = gates.clone().requires_grad_()
    model.train()  # recomputed layers: float32 needs it
    chosen = response_logprobs(model, rows, 1.0, Mixed(gates, window, path))
    model.eval()
    value = chosen
    if weighted:
        old = torch.full_like(chosen, -math.log(model.config.vocab_size))
        value = policy_loss(chosen, old, torch.ones_like(chosen)).loss
    (grad,) = torch.autograd.grad(value.mean(), gates)
    return [grad.cpu(), chosen.detach().cpu()]


def compare(name: str, found: list[torch.Tensor], right: list[torch.Tensor]) -> dict[str, Any]:
    """Relative errors of the gradient, as a whole, for the median layer and head; its cosine; log-probs."""
    ours, wanted = found[0], right[0]
    by_layer = (ours - wanted).norm(dim=1) / wanted.norm(dim=1)
    cosine = torch.nn.functional.cosine_similarity(ours.flatten(), wanted.flatten(), 0)
    return {
        "bf16": name,
        "gradient": relative_error(ours, wanted),
        "first layer": by_layer[0].item(),
        "median layer": by_layer.median().item(),
        "worst layer": by_layer.max().item(),
        "cosine": cosine.item(),
        "sign": (ours.sign() == wanted.sign()).float().mean().item(),
        "mean |log p|": (found[1] - right[1]).abs().mean().item(),
    }


def gradients(
    model: Any, wide: Any, rows: Rows, gates: torch.Tensor, window: Window, weighted: bool = False
) -> dict[str, Any]:
    """Norms of the float32 gradient, and a row for each way to compute in bf16; ``wide`` is float32."""

    def by(model: Any, path: str) -> list[torch.Tensor]:
        return gradient(model, rows, gates, window, path, weighted)

    right = by(wide, "reference")
    table = [compare("trainer (kernels)", by(model, "auto"), right)]
    with transformers_forward():
        for name, path in (
            ("transformers + our attention", "auto"),
            ("transformers + PyTorch fused", "chunked"),
            ("transformers + eager", "reference"),
        ):
            table.append(compare(name, by(model, path), right))
    layers = right[0].norm(dim=1)
    norms = {"whole": right[0].norm().item(), "first layer": layers[0].item()}
    norms["median layer"] = layers.median().item()
    print(
        f"gradient of the {'policy loss' if weighted else 'log-probability'}, norm in float32:",
        {name: f"{norm:.3e}" for name, norm in norms.items()},
    )
    print_table(table)
    return {"norms in float32": norms, "bf16": table}


@torch.inference_mode()
def logprobs(
    model: Any, wide: Any, prompts: list[list[int]], new: int, gates: torch.Tensor, window: Window
) -> list[dict[str, Any]]:
    """Mean and root-mean-square difference from float32, with soft gates and with full attention."""
    longest = max(map(len, prompts)) + new
    sampler = PagedSampler(model, window, slots=len(prompts), max_length=longest)
    params = SamplingParams(max_new_tokens=new, stop_ids=(model.config.vocab_size,))
    table: list[dict[str, Any]] = []
    for setting in ("soft", "full"):
        own = gates if setting == "soft" else torch.ones_like(gates)
        done = sampler.generate(prompts, params, own if setting == "soft" else None)
        rows = [(prompt, one.tokens) for prompt, one in zip(prompts, done, strict=True)]

        def by(model: Any, path: str, rows: Rows = rows, own: torch.Tensor = own) -> torch.Tensor:
            found = [response_logprobs(model, [row], 1.0, Mixed(own, window, path)) for row in rows]
            return torch.cat(found).cpu()

        with transformers_forward():
            right = by(wide, "reference")
            ways: dict[str, Callable[[], torch.Tensor]] = {
                "sampler": lambda done=done: torch.tensor([p for one in done for p in one.logprobs]),
                "transformers + PyTorch fused": lambda: by(model, "chunked"),
                "transformers + eager": lambda: by(model, "reference"),
            }
            found = {name: way() for name, way in ways.items()}
        found["trainer (kernels)"] = by(model, "auto")
        if setting == "full":
            for implementation in ("sdpa", "eager"):
                model.set_attn_implementation(implementation)
                found[f"transformers' {implementation}"] = plain_logprobs(model, rows)
            model.set_attn_implementation(NAME)
        for name, values in found.items():
            apart = values - right
            table.append({
                "attention": setting, "bf16": name, "mean |log p|": apart.abs().mean().item(),
                "rms": apart.square().mean().sqrt().item(), "mean": apart.mean().item(),
                "from sampler": (values - found["sampler"]).abs().mean().item(),
            })  # fmt: skip
    print_table(table)
    return table


def plain_logprobs(model: Any, rows: Rows) -> torch.Tensor:
    """transformers' own logits."""
    found = []
    for prompt, answer in rows:
        ids = torch.tensor([prompt + answer], device=model.device)
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        chosen = logits.float().log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])
        found.append(chosen[:, 0].cpu())
    return torch.cat(found)


def llama(tiny: bool, device: str) -> dict[str, Any]:
    """A random 8B model: an answer of 2,000 tokens, and sampled ones."""
    model = random_llama(device, tiny)
    if device == "cpu":
        model = model.float()  # the interpreter has no bf16
    recompute_activations(model)
    wide = copy.deepcopy(model).float()
    config, generator = model.config, torch.Generator().manual_seed(3)
    gates = torch.rand(config.num_hidden_layers, config.num_key_value_heads, generator=generator)
    gates, scale = gates.to(device), 20 if tiny else 1
    window = Window(4, 16) if tiny else Window(128, 256)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 20000, (count // scale,), generator=generator).tolist()

    rows = [(tokens(100), tokens(2000))]
    return {
        "gradients": gradients(model, wide, rows, gates, window),
        "policy gradients": gradients(model, wide, rows, gates, window, weighted=True),
        "logprobs": logprobs(
            model, wide, [tokens(40), tokens(140), tokens(900)], 128 // scale, gates, window
        ),
    }


def reasoner(tiny: bool, device: str) -> dict[str, Any]:
    """The pocket reasoner, trained, at its own window, on its own answers."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, tokenizer = pocket.load(dtype)
    model = model.to(device).eval().requires_grad_(False)
    model.set_attn_implementation(NAME)
    recompute_activations(model)
    wide = copy.deepcopy(model).float()
    generator = torch.Generator().manual_seed(3)
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    gates = torch.rand(shape, generator=generator).to(device)
    count = 2 if tiny else 24
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": one["prompt"]}], add_generation_prompt=True, return_dict=False
        )  # fmt: skip
        for one in pocket.problems("resolve", "test", count)
    ]
    sampler = PagedSampler(model, pocket.WINDOW, slots=count, max_length=400)
    params = SamplingParams(max_new_tokens=20 if tiny else 200)
    done = sampler.generate(prompts, params, gates)
    rows = [(prompt, one.tokens) for prompt, one in zip(prompts, done, strict=True)]
    return {
        "gradients": gradients(model, wide, rows, gates, pocket.WINDOW),
        "logprobs": logprobs(model, wide, prompts, params.max_new_tokens, gates, pocket.WINDOW),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU too: to try this out")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = card() if device == "cuda" else {}
    print("pocket reasoner")
    result["pocket"] = reasoner(arguments.tiny, device)
    print("random Llama-8B")
    result["llama"] = llama(arguments.tiny, device)
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
