"""``rlkv generate``: one answer by transformers' ``generate`` with the head-wise cache, and what it held."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rlkv.bench import pick_dtype, window_and_model
from rlkv.data import PromptSet, chat_tokens
from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.loading import load_model
from rlkv.mask import HeadMask
from rlkv.rank import format_bytes
from rlkv.support import check_model
from rlkv.window import Window

POSITIONAL = "prompt"


@dataclass
class Config:
    """What ``rlkv generate`` takes."""

    prompt: str  # the user's message, @FILE to read it, or pocket:resolve:3 for a development problem
    model: str = ""  # hub id, local folder, or pocket (empty: the one that the gates were trained on)
    gates: str = ""  # gates folder or table, cut at sparsity
    sparsity: float = 0.25  # fraction of heads made local
    mask: str = ""  # a mask file of `rlkv rank`, instead of gates and sparsity
    window: Window | None = None  # sink+recent of local heads (none: the one of the gates or mask)
    prefill: Literal["full", "local"] = "full"  # local heads see all of the prompt, or a windowed one
    max_new_tokens: int = 8192  # of the answer, or what the context leaves if that is less
    temperature: float = 0.0  # 0: greedy
    seed: int = 0  # of sampling, and of the order of equal gates
    device: str = "auto"  # auto, cpu, cuda, ...
    dtype: str = "auto"  # bfloat16 or float32 (auto: bfloat16 on a GPU, float32 on a CPU)

    def check(self) -> None:
        """Raise RLKVError for a value that cannot be meant."""
        if self.max_new_tokens < 1:
            raise RLKVError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise RLKVError(f"temperature must be 0 (greedy) or more, got {self.temperature}")


def run(config: Config) -> None:
    """Generate to the terminal, then print the cache's bytes beside the full cache's."""
    import torch
    from transformers import TextStreamer

    from rlkv.cache import HeadwiseCache

    config.check()
    text, answer = read_prompt(config.prompt)
    if bool(config.gates) == bool(config.mask):
        raise RLKVError("generate: give either gates=FOLDER (and sparsity=…) or mask=FILE")
    gates = HeadGates.load(config.gates) if config.gates else None
    mask = HeadMask.load(config.mask) if config.mask else None
    window, name = window_and_model(gates, mask, config.window, config.model)
    model, tokenizer = load_model(name, pick_dtype(config.dtype, config.device), config.device)
    shape = check_model(model)
    if gates is not None:
        gates.model = gates.check(shape)
        mask = gates.mask(config.sparsity, seed=config.seed, window=window)
    assert mask is not None
    mask.check(shape)
    for line in gates.remarks(window) if gates else mask.remarks(window):
        print(line)
    tokens, _ = chat_tokens(tokenizer, text)
    room = shape.context_length - len(tokens) if shape.context_length else config.max_new_tokens
    if room < 1:
        raise RLKVError(
            f"the prompt has {len(tokens)} tokens; the context of {name} is {shape.context_length}"
        )
    local = int((~mask.full).sum())
    print(f"{local} of {mask.full.numel()} KV heads local, window {window}; {text.strip()}\n", flush=True)
    mask = replace(mask, window=window, model=shape)
    cache = HeadwiseCache(model.config, mask, prefill=config.prefill)
    torch.manual_seed(config.seed)
    sampling: dict[str, Any] = {"do_sample": config.temperature > 0}
    if config.temperature > 0:
        sampling["temperature"] = config.temperature
    ids = torch.tensor([tokens], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=min(config.max_new_tokens, room),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
        **sampling,
    )
    written = output.shape[1] - len(tokens)
    held = output.shape[1] - 1  # the last token's keys are never made
    kept, full = mask.kv_bytes(held), mask.full_bytes(held)
    if answer is not None:
        print(f"\nthe right answer: {answer}")
    print(
        f"\n{written} tokens; the cache keeps {format_bytes(kept)} for {held} tokens, "
        f"{kept / full:.0%} of the full cache's {format_bytes(full)}; its storage, "
        f"in blocks of {cache.block} tokens, is {format_bytes(cache.nbytes())} (measured)"
    )


def read_prompt(prompt: str) -> tuple[str, str | None]:
    """(the user's message, the gold answer if known) from text, ``@FILE`` or ``pocket:TASK:NUMBER``."""
    if prompt.startswith("@"):
        try:
            text = Path(prompt[1:]).read_text(encoding="utf-8")
        except OSError as error:
            raise RLKVError(f"cannot read the prompt file {prompt[1:]}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise RLKVError(f"the prompt file {prompt[1:]} is not UTF-8 text") from None
    elif prompt.startswith("pocket:"):
        return pocket_problem(prompt)
    else:
        text = prompt
    if not text.strip():
        raise RLKVError("generate: the prompt is empty")
    return text, None


def pocket_problem(spec: str) -> tuple[str, str]:
    """Development problem ``pocket:TASK:NUMBER``, counted from 0."""
    _, _, place = spec.partition(":")
    task, _, number = place.partition(":")
    if not number.isdecimal() or "+" in task:
        raise RLKVError(f"expected pocket:TASK:NUMBER such as pocket:resolve:3, got {spec!r}")
    problem = PromptSet.from_pocket(task, "dev", int(number) + 1).problems[-1]
    return problem.prompt, problem.answer
