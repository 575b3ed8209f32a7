"""The Llama family's forward over tokens side by side, a dozen launches a layer: for decoding and training.

transformers' forward launches about fifty small kernels a layer. In a decode step they cost as much as half
the reading of the weights does; in training they move three times the bytes of these, and autograd keeps what
they leave behind. Other models go through their own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from rlkv.kernels import HEAD_DIMS, available, interpreted

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # layer, query, key, value


class FamilyForward:
    """Final hidden states of a model of the Llama family; gradients reach whatever ``attend`` brings in."""

    def __init__(self, model: Any, join: bool = False) -> None:
        self._inner = model.base_model
        self._layers = list(self._inner.layers)
        self._dim = self._layers[0].self_attn.head_dim
        self._fused = use_kernels(next(model.parameters()).device, self._dim)
        if join:
            for layer in self._layers:
                attention, mlp = layer.self_attn, layer.mlp
                join_weights([attention.q_proj, attention.k_proj, attention.v_proj])
                join_weights([mlp.gate_proj, mlp.up_proj])
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what the weights occupied before

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the model's layers are those that this forward knows, with nothing attached to them.

        Adapters, hooks, quantised weights and replaced modules are the model's own forward's to respect; what
        is attached to ``model`` itself, around its output embedding, neither forward meets.
        """
        config, layers = model.config, getattr(model.base_model, "layers", None)
        if config.model_type not in FAMILY or config.hidden_act != "silu" or not layers:
            return False
        parts = [part for layer in layers for part in layer.modules()]
        parts += [model.base_model, model.base_model.norm]
        dtypes = {parameter.dtype for part in parts for parameter in part.parameters(recurse=False)}
        return len(dtypes) == 1 and dtypes.pop().is_floating_point and all(map(is_plain, parts))

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """tokens, positions int64 [n] -> [n, width] after the final norm.

        ``attend(layer, query [n, Hq, D], key [n, Hkv, D], value)`` returns [n, Hq, D]. Layers that
        transformers would recompute in the backward pass (in training mode, after
        :func:`rlkv.loading.recompute_activations`) are recomputed here too.
        """
        hidden = self._inner.embed_tokens(tokens)
        angles = tuple(part[0].contiguous() for part in self._inner.rotary_emb(hidden[None], positions[None]))
        normed, residual = self._add_norm(hidden, None, self._layers[0].input_layernorm)
        for index, layer in enumerate(self._layers):
            step = self._layer
            if layer.training and getattr(layer, "gradient_checkpointing", False):
                step = partial(checkpoint, step, use_reentrant=False, preserve_rng_state=False)
            normed, residual = step(index, normed, residual, angles, attend)
        return normed

    def _layer(
        self, index: int, normed: torch.Tensor, residual: torch.Tensor, angles: Any, attend: Attend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From one layer's input, normed and as it is, to the next one's."""
        layer = self._layers[index]
        attention, mlp = layer.self_attn, layer.mlp
        states = product(normed, [attention.q_proj, attention.k_proj, attention.v_proj])
        sizes = [linear.out_features for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
        query, key, value = (part.unflatten(-1, (-1, self._dim)) for part in states.split(sizes, -1))
        query, key = self._rotate(attention, query, key, *angles)
        hidden = attention.o_proj(attend(index, query, key, value).flatten(1))
        normed, residual = self._add_norm(hidden, residual, layer.post_attention_layernorm)
        hidden = mlp.down_proj(self._silu_times(product(normed, [mlp.gate_proj, mlp.up_proj])))
        last = index + 1 == len(self._layers)
        norm = self._inner.norm if last else self._layers[index + 1].input_layernorm
        return self._add_norm(hidden, residual, norm)

    def _silu_times(self, gate_up: torch.Tensor) -> torch.Tensor:
        if self._fused:
            from rlkv.kernels.elementwise import silu_times

            return silu_times(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def _add_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._fused:
            from rlkv.kernels.elementwise import add_norm

            return add_norm(x, residual, norm.weight, norm.variance_epsilon)
        total = x if residual is None else x + residual
        return norm(total), total

    def _rotate(
        self, attention: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        norms = None
        if hasattr(attention, "q_norm"):
            norms = (attention.q_norm, attention.k_norm)
        if self._fused:
            from rlkv.kernels.elementwise import rotary

            weights = None if norms is None else (norms[0].weight, norms[1].weight)
            eps = 0.0 if norms is None else norms[0].variance_epsilon
            return rotary(query, key, cos, sin, weights, eps)
        if norms is not None:
            query, key = norms[0](query), norms[1](key)
        half = self._dim // 2

        def turn(x: torch.Tensor) -> torch.Tensor:
            swapped = torch.cat([-x[..., half:], x[..., :half]], -1)
            return x * cos[:, None] + swapped * sin[:, None]

        return turn(query), turn(key)


def is_plain(module: Any) -> bool:
    """Whether a module's forward is that of its class, and its class PyTorch's or transformers' own."""
    origin = type(module).__module__
    if isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear:
        return False
    attached = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    own = origin.startswith(("torch.nn.modules.", "transformers.models.", "transformers.activations"))
    return own and not attached and "forward" not in vars(module)


def use_kernels(device: torch.device, head_dim: int | None = None) -> bool:
    """Whether Triton kernels run on this device (CUDA, or a CPU in Triton's interpreter), for such heads."""
    fits = head_dim is None or head_dim in HEAD_DIMS
    return fits and available() and (device.type == "cuda" or interpreted())


def product(x: torch.Tensor, linears: list[Any]) -> torch.Tensor:
    """``linear(x)`` of each, side by side; one matrix product when their weights were joined."""
    whole = _whole(linears)
    if whole is None:
        return torch.cat([linear(x) for linear in linears], -1)
    biases = [linear.bias for linear in linears]
    return F.linear(x, whole, None if biases[0] is None else torch.cat(biases))


def join_weights(linears: list[Any]) -> None:
    """Lay the weights of ``linears`` out one after the other; each stays a parameter, a view of the whole."""
    if _whole(linears) is not None:
        return
    whole = torch.cat([linear.weight.data for linear in linears])
    for linear, part in zip(linears, whole.split([linear.out_features for linear in linears]), strict=True):
        linear.weight.data = part


def _whole(linears: list[Any]) -> torch.Tensor | None:
    """The joined weights as one tensor, if they lie one after the other in one block of memory."""
    first = linears[0].weight
    rows, place = 0, first.data_ptr()
    for linear in linears:
        weight = linear.weight
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or weight.data_ptr() != place + rows * weight.shape[1] * weight.element_size():
            return None
        rows += weight.shape[0]
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))
