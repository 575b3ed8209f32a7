"""Pretrain the pocket reasoner from scratch: one GPU, under ten minutes, plain next-token imitation.

    python -m rlkv.pocket.pretrain out=runs/pocket minutes=8

Each step takes one batch of every task, padded to that task's longest example, with the loss on the
completion alone (thought, answer, end). Five per cent of the reasoning examples are asked without a thought,
so that "answer at once" is something the model was taught, not something it never saw. Weights are trained in
float32 under bfloat16 autocast and saved in bfloat16; the learning rate falls to zero when the time is up.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from rlkv.cli import script
from rlkv.pocket.batches import EOS, WIDTHS, Pool, draw, label
from rlkv.pocket.tasks import TASKS
from rlkv.pocket.tokenizer import VOCABULARY, build_tokenizer


@dataclass
class PretrainConfig:
    """``python -m rlkv.pocket.pretrain key=value ...``"""

    out: Path = Path("runs/pocket")  # folder for the model, log.jsonl and card.json
    minutes: float = 7.0  # wall-clock time of training
    layers: int = 6  # of the model
    width: int = 256  # of its hidden states
    query_heads: int = 32  # of a layer
    kv_heads: int = 16  # of a layer
    head_dim: int = 16  # values of a key
    mlp: int = 512  # width of the MLP
    rope_theta: float = 1e5  # base of the rotary embedding
    rows: int = 32  # examples of each task a step
    examples: int = 300_000  # drawn beforehand, of each task
    no_thought: float = 0.05  # share of reasoning examples asked without a thought
    learning_rate: float = 2e-3  # at its peak
    warmup_steps: int = 200  # until that peak
    weight_decay: float = 0.1  # of AdamW, on matrices
    workers: int = 14  # processes that draw the examples
    seed: int = 0  # of the weights and the examples
    graph: bool = True  # capture the step as a CUDA graph
    compile: bool = True  # fuse each decoder layer's small operations (Inductor)
    device: str = "cuda"  # cuda or cpu


def build_model(config: PretrainConfig) -> Qwen3ForCausalLM:
    """A small Qwen3 with random weights."""
    torch.manual_seed(config.seed)
    shape = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=config.width,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.query_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=VOCABULARY["<bos>"],
        eos_token_id=EOS,
        pad_token_id=VOCABULARY["<pad>"],
    )
    model = Qwen3ForCausalLM(shape)
    model.generation_config = GenerationConfig(
        bos_token_id=VOCABULARY["<bos>"], eos_token_id=EOS, pad_token_id=VOCABULARY["<pad>"], do_sample=False
    )
    return model


def logits_of(model: Qwen3ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """[rows, width, vocabulary]; right padding needs no mask, which keeps the fused causal attention."""
    place = torch.arange(ids.shape[1], device=ids.device)[None]
    # A captured graph may not cache.
    with torch.autocast(ids.device.type, torch.bfloat16, cache_enabled=False):
        hidden = model.model(
            ids, attention_mask={"full_attention": None}, position_ids=place, use_cache=False
        )
        return model.lm_head(hidden.last_hidden_state).float()


def exact(model: Qwen3ForCausalLM, held: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Share of held-out examples whose every completion token is the arg max: the greedy trace is then right.

    Runs with gradients on, because a compiled layer would be compiled a second time without them.
    """
    result = {}
    for task, (ids, labels) in held.items():
        right = []
        for part, target in zip(ids.split(64), labels.split(64), strict=True):
            best = logits_of(model, part).detach().argmax(-1)
            right.append(((best == target) | (target == -100)).all(dim=1))
        result[task] = torch.cat(right).float().mean().item()
    return result


class Stepper:
    """One optimiser step over a batch of every task; on a GPU it is captured once and replayed as a graph.

    The model is so small that launching its kernels one by one costs several times their run time.
    """

    def __init__(self, model: Qwen3ForCausalLM, config: PretrainConfig) -> None:
        self.model, self.config = model, config
        self.on_gpu = config.device.startswith("cuda")
        matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        vectors = [parameter for parameter in model.parameters() if parameter.ndim != 2]
        self.rate = torch.tensor(config.learning_rate, device=config.device)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=self.rate,
            betas=(0.9, 0.98),
            fused=self.on_gpu,
            capturable=self.on_gpu,
        )
        shape = {task: (config.rows, WIDTHS[task]) for task in TASKS}
        self.ids = {task: torch.zeros(shape[task], dtype=torch.long, device=config.device) for task in TASKS}
        self.labels = {task: torch.zeros_like(ids) for task, ids in self.ids.items()}
        self.losses = torch.zeros(len(TASKS), device=config.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _step(self) -> None:
        for index, task in enumerate(TASKS):
            logits = logits_of(self.model, self.ids[task]).flatten(0, 1)
            loss = cross_entropy(logits, self.labels[task].flatten())
            (loss / len(TASKS)).backward()
            self.losses[index].copy_(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def capture(self, pools: dict[str, Pool]) -> None:
        """Compile and capture the step; the few warm-up steps are real ones at a small learning rate."""
        self.rate.fill_(self.config.learning_rate / self.config.warmup_steps)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(4):
                self._load(pools)
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    def _load(self, pools: dict[str, Pool]) -> None:
        for task, pool in pools.items():
            ids, labels = pool.batch(self.config.rows)
            self.ids[task].copy_(ids)
            self.labels[task].copy_(labels)

    def run(self, pools: dict[str, Pool], rate: float) -> None:
        """One step at ``rate`` times the peak learning rate; ``losses`` then holds each task's loss."""
        self.rate.fill_(self.config.learning_rate * rate)
        self._load(pools)
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()


def train(config: PretrainConfig) -> None:
    """Train until the time is up; writes ``log.jsonl`` as it goes and the model at the end."""
    config.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    model: Any = build_model(config)
    model.to(config.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters; {config.examples:,} examples of each task", flush=True)
    with ProcessPoolExecutor(config.workers) as executor:
        pools = {
            task: Pool(
                task,
                config.examples,
                executor,
                workers=config.workers,
                seed=config.seed,
                no_thought=config.no_thought,
                device=config.device,
            )
            for task in TASKS
        }
    held = {}
    for task in TASKS:
        tokens, starts = (
            torch.from_numpy(array).to(config.device) for array in draw(task, 256, 1, 0.0, "dev")
        )
        held[task] = label(tokens.long(), starts)
    print(f"drawn after {time.time() - started:.0f} s", flush=True)
    if config.compile:  # by layer: one compilation serves all layers and all widths
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    stepper = Stepper(model, config)
    if stepper.on_gpu and config.graph:
        stepper.capture(pools)
        print(f"captured after {time.time() - started:.0f} s", flush=True)
    began, step, next_report = time.time(), 0, 0.0
    with (config.out / "log.jsonl").open("w") as log:
        while (elapsed := (time.time() - began) / 60) < config.minutes:
            rate = min(1.0, (step + 1) / config.warmup_steps) * (1 - elapsed / config.minutes)
            stepper.run(pools, rate)
            step += 1
            if stepper.on_gpu and step % 20 == 0:
                torch.cuda.synchronize()  # keeps the clock honest
            if elapsed >= next_report:
                next_report = elapsed + 0.5
                losses = zip(TASKS, stepper.losses.tolist(), strict=True)
                row = {
                    "step": step,
                    "minutes": round(elapsed, 2),
                    "learning_rate": round(rate, 4),
                    "loss": {task: round(loss, 4) for task, loss in losses},
                    "exact": {task: round(share, 4) for task, share in exact(model, held).items()},
                }
                log.write(json.dumps(row) + "\n")
                log.flush()
                print(row, flush=True)
    model.to(torch.bfloat16).save_pretrained(config.out)
    build_tokenizer().save_pretrained(config.out)
    model.float()
    card = {
        "parameters": parameters,
        "steps": step,
        "minutes": round((time.time() - started) / 60, 2),
        "exact_trace_dev": exact(model, held),
        "device": torch.cuda.get_device_name() if stepper.on_gpu else "cpu",
        "torch": torch.__version__,
        "config": {**asdict(config), "out": str(config.out)},
    }
    (config.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"{step} steps; exact traces on dev, rounded to bfloat16: {card['exact_trace_dev']}", flush=True)


if __name__ == "__main__":
    sys.exit(script("python -m rlkv.pocket.pretrain", __doc__.splitlines()[0], PretrainConfig, train))
