"""DuoAttention's gate training: keep the final hidden states of retrieval with few full heads.

    rlkv-eval train-duo model=pocket output=gates/duo-pocket window=4+16

Loss (arXiv 2410.10819, section 2.3, and its code): mean squared distance between the final hidden states of
the full and of the mixed model on the labelled tokens, plus ``penalty`` times the mean gate. AdamW without
decay on the gates only, a learning rate that rises over the first fifth and falls over the last, gates
clamped to [0, 1]. Their gates are bfloat16 and their local mask is in blocks of 128 tokens; ours are float32
and exact.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlkv import checkpoint
from rlkv.attention import NAME, Mixed
from rlkv.bench import pick_dtype
from rlkv.config import plain
from rlkv.config import save as save_config
from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.loading import load_model, recompute_activations
from rlkv.metrics import Metrics
from rlkv.support import check_model
from rlkv.window import Window
from rlkv_eval.methods.duo_settings import TrainDuoConfig
from rlkv_eval.methods.passkeys import Passkeys, padded

__all__ = ["POSITIONAL", "DuoTrainer", "TrainDuoConfig", "run", "train_duo"]

POSITIONAL = ""
# A resumed run may change these.
FREE = {"output", "resume", "device", "checkpoint_every", "keep_checkpoints"}


def run(config: TrainDuoConfig) -> None:
    """The command: train, and say what came out."""
    found = train_duo(config).stats()
    print(
        f"gates in {config.output}: mean {found['mean']:.3f}, {found['below_0.1']:.0%} below 0.1, "
        f"{found['above_0.9']:.0%} above 0.9"
    )


def train_duo(config: TrainDuoConfig, model: Any = None, tokenizer: Any = None) -> HeadGates:
    """Train gates as ``config`` says, write them to ``config.output`` and return them.

    ``model`` and ``tokenizer`` default to those that ``config`` names. RLKVError for bad settings, contexts
    beyond the model's, or an output that holds another run.
    """
    config.check()
    if model is None:
        if not config.model:
            raise RLKVError("train-duo: no model is named: give model=pocket, model=FOLDER or model=HUB_ID")
        dtype = pick_dtype(config.dtype, config.device)
        model, tokenizer = load_model(config.model, dtype, config.device)
    return DuoTrainer(config, model, tokenizer).run()


class DuoTrainer:
    """One run; contexts are a function of seed and step, so a checkpoint needs only gates and optimiser."""

    def __init__(self, config: TrainDuoConfig, model: Any, tokenizer: Any) -> None:
        self.config, self.folder = config, Path(config.output)
        self.model = model.eval().requires_grad_(False)
        self.model.set_attn_implementation(NAME)
        self.shape = check_model(model)
        self.window = config.window or Window(128, 256)
        self.data = Passkeys(
            tokenizer,
            style=config.style,
            haystack=config.haystack,
            count=config.passkeys,
            words=config.words,
            shortest=config.context_min,
            longest=config.context_max,
            lengths=config.lengths,
            seed=config.seed,
        )
        self.check_lengths()
        if config.gradient_checkpointing:
            recompute_activations(model)
        start = torch.ones(self.shape.layers, self.shape.kv_heads, device=model.device)
        self.gates = torch.nn.Parameter(start)
        self.optimizer = torch.optim.AdamW([self.gates], lr=config.learning_rate, weight_decay=0.0)
        self.done, self.metrics_bytes = 0, 0
        self.restore()

    def check_lengths(self) -> None:
        """Raise RLKVError for contexts that the model cannot hold, or that hide nothing from a local head."""
        words = self.data.style == "passkeys"
        longest = self.config.context_max if words else len(self.data.sequence(0).tokens)
        limit = self.shape.context_length
        if limit and longest > limit:
            raise RLKVError(
                f"train-duo: contexts of {longest} tokens exceed the model's context of {limit}: lower "
                "context_max"
            )
        if longest <= self.window.size:
            raise RLKVError(
                f"train-duo: contexts of {longest} tokens lie within the window {self.window}, so local "
                "heads see all of them: give a smaller window"
            )

    def run(self) -> HeadGates:
        """The loop."""
        config = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        save_config(config, self.folder / "config.yaml")
        metrics = Metrics(self.folder, self.done, self.metrics_bytes, tensorboard=False)
        try:
            with progress(config.steps, self.done) as tick:
                while self.done < config.steps:
                    values = self.step()
                    metrics.log(self.done, values)
                    tick(values)
                    if self.done % config.checkpoint_every == 0 or self.done == config.steps:
                        self.save(metrics.bytes)
        finally:
            metrics.close()
        gates = HeadGates(self.gates.detach(), window=self.window, model=self.shape)
        facts = {"style": self.data.style, "steps": self.done, "config": plain(config)}
        gates.save(self.folder, method="DuoAttention", **facts)
        return HeadGates.load(self.folder)

    def step(self) -> dict[str, float]:
        """One update: distance of the hidden states, mean gate, and what they add up to."""
        config, began = self.config, time.perf_counter()
        rows = [self.data.sequence(self.done * config.rows + row) for row in range(config.rows)]
        ids, labelled = padded(rows, self.model.device)
        distance = self.distance(ids, labelled)
        mean_gate = self.gates.abs().mean()
        loss = distance + config.penalty * mean_gate
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(self.done)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.gates.clamp_(0, 1)
        self.done += 1
        return {
            "loss": loss.item(),
            "distance": distance.item(),
            "gate_mean": mean_gate.item(),
            "below_half": (self.gates < 0.5).float().mean().item(),
            "tokens": ids.numel(),
            "seconds": time.perf_counter() - began,
        }

    def distance(self, ids: torch.Tensor, labelled: torch.Tensor) -> torch.Tensor:
        """Mean squared distance of full and mixed final hidden states; ids, labelled (bool) [rows, tokens].

        Rows are padded on the right, which causal attention never sees, so no mask is needed.
        """
        with torch.no_grad():
            full = self.model.base_model(ids, use_cache=False).last_hidden_state[labelled].float()
        self.model.train(self.config.gradient_checkpointing)  # recomputing acts only in train()
        mixed = self.model.base_model(ids, use_cache=False, rlkv=Mixed(self.gates, self.window))
        self.model.eval()
        return (mixed.last_hidden_state[labelled].float() - full).pow(2).mean()

    def save(self, metrics_bytes: int) -> None:
        state = {
            "step": self.done,
            "gates": self.gates.detach().cpu(),
            "optimizer": self.optimizer.state_dict(),
            "metrics_bytes": metrics_bytes,
            "config": plain(self.config),
        }
        checkpoint.save(self.folder / "checkpoints", self.done, state, self.config.keep_checkpoints)

    def restore(self) -> None:
        state = checkpoint.load_last(self.folder / "checkpoints")
        if state is None:
            return
        if not self.config.resume:
            raise RLKVError(
                f"{self.folder} already holds a run at step {state['step']}: give resume=true to go on, or "
                "another output"
            )
        for name, value in plain(self.config).items():
            if name not in FREE and (old := state["config"].get(name, value)) != value:
                raise RLKVError(f"resume: the run in {self.folder} had {name}={old}, now it is {value}")
        self.gates.data.copy_(state["gates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.metrics_bytes = state["step"], state["metrics_bytes"]


@contextmanager
def progress(total: int, done: int) -> Iterator[Any]:
    """``tick(values)`` after each step: a bar on a terminal, a line every twentieth of the run elsewhere."""
    from rich.progress import Progress, TextColumn

    terminal = sys.stdout.isatty()
    bar = Progress(*Progress.get_default_columns(), TextColumn("{task.fields[now]}"), disable=not terminal)
    task = bar.add_task("train-duo", total=total, completed=done, now="")
    step = done

    def tick(values: dict[str, float]) -> None:
        nonlocal step
        step += 1
        now = f"distance {values['distance']:.4f} gate {values['gate_mean']:.3f}"
        bar.update(task, advance=1, now=now)
        if not terminal and (step % max(1, total // 20) == 0 or step == total):
            print(f"train-duo: step {step}/{total}  {now}", flush=True)

    with bar:
        yield tick
