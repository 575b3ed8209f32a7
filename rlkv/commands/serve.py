"""``rlkv serve``: an OpenAI server (SGLang) with a head mask; prints what that saves, then starts it."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import dataclass, replace
from importlib.metadata import distributions, entry_points
from typing import Literal

from rlkv.bench import window_and_model
from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.loading import load_shape
from rlkv.mask import HeadMask
from rlkv.serving.plan import Plan
from rlkv.serving.report import describe, describe_budget
from rlkv.window import Window

POSITIONAL = "model"


@dataclass
class Config:
    """What ``rlkv serve`` takes."""

    model: str = ""  # hub id, local folder, or pocket (empty: the one that the gates were trained on)
    gates: str = ""  # gates folder or table, cut at sparsity
    sparsity: float = 0.5  # fraction of heads made local
    mask: str = ""  # a mask file of `rlkv rank`, instead of gates and sparsity
    window: Window | None = None  # sink+recent of local heads (none: the one of the gates or mask)
    prefill: Literal["full", "local"] = "full"  # local heads see all of the prompt, or a windowed one
    prompt_tokens: int = 0  # longest prompt, with prefill full (0: 16384, or the context if that is less)
    seed: int = 0  # of the order of equal gates
    tp: int = 1  # GPUs that share the model
    kv_gib: float = 0.0  # memory for keys and values on each, to say how many requests fit (0: in 10 GiB)
    host: str = "127.0.0.1"  # address to listen on
    port: int = 30000  # port to listen on
    options: str = ""  # more options for SGLang, as on its command line
    dry_run: bool = False  # only print the plan and the command


def run(config: Config) -> int:
    """Print the plan, then become the server."""
    plan, name = make_plan(config)
    print(describe(plan))
    print(describe_budget(plan, int((config.kv_gib or 10) * 2**30), staging(config, plan)))
    command = server_command(config, name)
    print("\n" + shlex.join(command), flush=True)
    if config.dry_run:
        return 0
    check_engine()
    os.execve(command[0], command, os.environ | plugin_settings(config, plan))


def make_plan(config: Config) -> tuple[Plan, str]:
    """(the plan, the model's name); RLKVError where gates, mask, model and ranks don't fit."""
    if bool(config.gates) == bool(config.mask):
        raise RLKVError("serve: give either gates=FOLDER (and sparsity=…) or mask=FILE")
    gates = HeadGates.load(config.gates) if config.gates else None
    mask = HeadMask.load(config.mask) if config.mask else None
    window, name = window_and_model(gates, mask, config.window, config.model)
    shape = load_shape(name)
    if gates is not None:
        gates.model = gates.check(shape)
        mask = gates.mask(config.sparsity, seed=config.seed, tp=config.tp, window=window)
    assert mask is not None
    for line in gates.remarks(window) if gates else mask.remarks(window):
        print(line)
    return Plan(mask, shape, window, config.prefill, config.tp, shape.bytes_per_value), name


def staging(config: Config, plan: Plan) -> int:
    """Prompt tokens that the server will set memory aside for; ``options`` may say how it cuts prompts."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--chunked-prefill-size", type=int, default=1)
    parser.add_argument("--context-length", type=int, default=plan.shape.context_length)
    given = parser.parse_known_args(shlex.split(config.options))[0]
    shape = replace(plan.shape, context_length=given.context_length)
    return replace(plan, shape=shape).staging(config.prompt_tokens) if given.chunked_prefill_size > 0 else 0


def plugin_settings(config: Config, plan: Plan) -> dict[str, str]:
    """The environment that the plugin reads."""
    settings = {
        "RLKV_GATES": config.gates,
        "RLKV_MASK": config.mask,
        "RLKV_SPARSITY": str(config.sparsity),
        "RLKV_SEED": str(config.seed),
        "RLKV_WINDOW": str(plan.window),
        "RLKV_PREFILL": config.prefill,
        "RLKV_PROMPT_TOKENS": str(config.prompt_tokens or ""),
    }
    return {key: value for key, value in settings.items() if value}


def server_command(config: Config, name: str) -> list[str]:
    """SGLang's server with the plugin's attention."""
    if name == "pocket":
        from rlkv.pocket import weights_folder

        name = str(weights_folder())
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", name]
    command += ["--attention-backend", "rlkv", "--host", config.host]
    command += ["--port", str(config.port), "--tp-size", str(config.tp)]
    return command + shlex.split(config.options)


def check_engine() -> None:
    """Raise RLKVError when SGLang or the plugin is not installed."""
    if not list(distributions(name="sglang")):
        raise RLKVError("serve: SGLang is not installed here; docs/serving.md says which release and how")
    if not any(point.name == "rlkv" for point in entry_points(group="sglang.srt.plugins")):
        raise RLKVError("serve: SGLang's plugin is not installed: pip install -e sglang/")
