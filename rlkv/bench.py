"""What eval, ablation and rank stand on: the settings, and a model with its problems, grader and sampler."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from rlkv.data import Encoded, PromptSet
from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.loading import load_model, pick_device
from rlkv.mask import HeadMask
from rlkv.rewards import get_reward
from rlkv.sampler import Sampler
from rlkv.support import ModelShape, check_model
from rlkv.window import Window

Method = Literal["rlkv", "random", "ablation"]

NO_WINDOW = "no window is known for the local heads: give window=SINK+RECENT, such as window=16+64"
NO_MODEL = "no model is named: give model=pocket, model=FOLDER or model=HUB_ID"


@dataclass
class EvalConfig:
    """What ``rlkv eval`` takes; lengths are in tokens."""

    # What
    model: str = ""  # hub id, local folder, or pocket (empty: the one that the gates were trained on)
    gates: str = ""  # gates folder or table, for the method rlkv
    output: str = "runs/eval"  # folder for rows, results and table; an unfinished run there goes on
    data: str = ""  # hub id, .jsonl path, or pocket:resolve+search (empty: the pocket model's own)
    split: str = "test"  # of a hub dataset or of the pocket
    n: int = 100  # problems (0: all; the pocket makes 1024)
    prompt_column: str = "prompt"  # column of the user's message
    answer_column: str = "answer"  # column of the gold answer
    prompt_template: str = "{prompt}"  # wraps the prompt column
    reward: str = "auto"  # exact, math or module.path:function (auto: exact for the pocket, else math)

    # Masks; the full cache is always evaluated too
    methods: list[Method] = field(default_factory=lambda: ["rlkv", "random"])  # rankings to compare
    sparsities: list[float] = field(default_factory=lambda: [0.25, 0.5])  # fractions of heads made local
    random_masks: int = 4  # random masks at each sparsity
    rounding: Literal["global", "layer"] = "global"  # rank over all layers, or keep equally many in each
    tp: int = 1  # keep a multiple of this in each layer, for tensor-parallel serving
    window: Window | None = None  # sink+recent of local heads (none: the one the gates were trained for)
    ablation_problems: int = 64  # dev problems that score the heads for the method ablation
    ablation_split: str = "dev"  # where those come from
    ablation_data: str = ""  # where those come from, if not from another split of data

    # Generation
    prefill: Literal["full", "local"] = "full"  # local heads see all of the prompt, or a windowed one
    max_new_tokens: int = 8192  # of an answer, or what the context leaves if that is less
    slots: int = 64  # answers written at the same time
    chunk: int = 8192  # answers in one sampler run

    # Running
    seed: int = 0  # of problems, random masks and ties
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: str = "auto"  # bfloat16 or float32 (auto: bfloat16 on a GPU, float32 on a CPU)

    def check(self) -> None:
        """Raise RLKVError for a value that cannot be meant."""
        for name in ("max_new_tokens", "slots", "chunk", "random_masks", "ablation_problems"):
            if getattr(self, name) < 1:
                raise RLKVError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.n < 0:
            raise RLKVError(f"n is a number of problems, 0 or more (0: all); got {self.n}")
        for sparsity in self.sparsities:
            if not 0 <= sparsity <= 1:
                raise RLKVError(
                    f"sparsity is the fraction of heads made local, within [0, 1]; got {sparsity}"
                )
        if not self.output:
            raise RLKVError("no folder to write to is named: give output=FOLDER")
        if "rlkv" in self.methods and not self.gates:
            raise RLKVError("eval: the method rlkv needs gates=FOLDER (or choose methods=random,ablation)")


class Bench:
    """A model with its sampler and reward: what eval, ablation and rank answer problems with.

    A model by name is loaded when it is first needed: what is cheaper to check comes first.
    """

    def __init__(self, config: EvalConfig, model: Any = None, tokenizer: Any = None) -> None:
        config.check()
        self.config = config
        self.gates = HeadGates.load(config.gates) if config.gates else None
        given = "the given model" if model is not None else config.model
        self.window, self.name = window_and_model(self.gates, None, config.window, given)
        for line in self.gates.remarks(self.window) if self.gates else ():
            print(line)
        pocket = self.name == "pocket"
        self.spec = config.data or ("pocket" if pocket else "")
        reward = config.reward if config.reward != "auto" else "exact" if pocket else "math"
        self.reward = get_reward(reward)
        dtype = pick_dtype(config.dtype, config.device)
        # The config again, with what its empty and automatic values come to.
        self.settings = replace(
            config,
            model=config.model or self.name,
            window=self.window,
            data=self.spec,
            reward=reward,
            dtype=dtype,
        )
        self.given = model, tokenizer

    @cached_property
    def loaded(self) -> tuple[Any, Any, ModelShape]:
        """Model, tokenizer and shape; RLKVError for a model that can't be used, or not with these gates."""
        model, tokenizer = self.given
        if model is None:
            model, tokenizer = load_model(self.name, self.settings.dtype, self.settings.device)
        return model, tokenizer, self.gates.check(model) if self.gates else check_model(model)

    @property
    def model(self) -> Any:
        """The one given, or the one named."""
        return self.loaded[0]

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.loaded[1]

    @property
    def shape(self) -> ModelShape:
        """The model's."""
        return self.loaded[2]

    def source(self, data: str, split: str) -> tuple[str, str]:
        """(prompt set, split) in effect: the pocket model's own by default; a JSONL file has no splits."""
        spec = data or self.spec
        return spec, "" if spec.endswith((".jsonl", ".json")) else split

    def problems(self, data: str, split: str, n: int) -> Encoded:
        """Problems with their tokens; those of more than half the context are left out, and counted."""
        config = self.config
        found = PromptSet.from_spec(
            *self.source(data, split),
            n,
            config.seed,
            prompt=config.prompt_column,
            answer=config.answer_column,
            template=config.prompt_template,
        )
        context = self.shape.context_length
        return found.encode(self.tokenizer, context // 2 if context else 10**9, limit="half the context")

    def sampler(self, prompts: Encoded) -> Sampler:
        """A sampler with room for these prompts and their answers."""
        longest = max(map(len, prompts.tokens)) + self.config.max_new_tokens
        if self.shape.context_length:
            longest = min(longest, self.shape.context_length)
        slots = self.config.slots
        return Sampler(self.model, self.window, slots=slots, max_length=longest, prefill=self.config.prefill)


def window_and_model(
    gates: HeadGates | None, mask: HeadMask | None, window: Window | None, model: str
) -> tuple[Window, str]:
    """``window`` and ``model`` or, where not given, what mask or gates record; RLKVError for both at once."""
    window = window or (mask.window if mask else None) or (gates.deployed if gates else None)
    model = model or (mask.model.name if mask and mask.model else "") or recorded_model(gates)
    require(window, model)
    assert window is not None
    return window, model


def require(window: object, model: object) -> None:
    """Raise RLKVError that names what is not known, and how to give it."""
    lacking = [message for known, message in ((window, NO_WINDOW), (model, NO_MODEL)) if not known]
    if lacking:
        raise RLKVError("; ".join(lacking))


def deployed_window(gates: HeadGates | None) -> Window:
    """The window that the gates are meant for; RLKVError without one."""
    if gates is None or gates.deployed is None:
        raise RLKVError(NO_WINDOW)
    return gates.deployed


def trained_model(gates: HeadGates | None) -> str:
    """The model that the gates' card names; RLKVError without one."""
    require(True, name := recorded_model(gates))
    return name


def recorded_model(gates: HeadGates | None) -> str:
    """The model that the gates' card names, or ""."""
    config = gates.card.get("config") if gates else None
    return str(config.get("model") or "") if isinstance(config, dict) else ""


def pick_dtype(dtype: str, device: str) -> str:
    """``dtype``, or for "auto" the one that suits the device."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if pick_device(device).type == "cuda" else "float32"
