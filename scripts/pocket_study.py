"""The pocket reasoner's result: gates from three seeds and three targets, against random masks and ablation.

    python scripts/pocket_study.py output=docs/results/pocket gpus=1

Runs `rlkv train` and `rlkv eval` as processes, a few on each GPU at a time, then merges their answers into
results.json and table.md: every mask has answered the same held-out problems, so all comparisons are paired.
An interrupted study goes on where it was. About six GPU-minutes a seed on an H100, evaluation included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rlkv.answers import read_rows
from rlkv.config import load
from rlkv.files import write_atomically
from rlkv.gates import HeadGates
from rlkv.mask import HeadMask
from rlkv.penalty import gate_sparsity
from rlkv.report import Entry, markdown, summarise

DATA = "pocket:resolve+search+ledger+recall"  # recall is never trained on: it needs no thought

TRAIN = "pocket:resolve+search+ledger"


@dataclass
class StudyConfig:
    """``python scripts/pocket_study.py key=value ...``"""

    output: Path = Path("runs/study")  # folder for everything
    gpus: int = 1  # GPUs to use
    jobs_a_gpu: int = 1  # processes that share a GPU
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    targets: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    sparsities: list[float] = field(default_factory=lambda: [0.25, 0.375, 0.5, 0.625])
    problems: int = 4096  # held-out problems, a quarter of each task
    random_masks: int = 8
    train: list[str] = field(default_factory=list)  # more settings for rlkv train
    device: str = "cuda"


@dataclass
class Job:
    """One process: ``after`` names the job whose result it needs."""

    name: str
    arguments: list[str]
    after: str = ""
    module: str = "rlkv.cli"


def make_jobs(config: StudyConfig) -> list[Job]:
    """Training first, then what does not wait for it, then the evaluation of each seed."""
    out = config.output
    more = [f"device={config.device}", "dtype=float32", "resume=true", *config.train]
    jobs = [
        Job(
            f"seed-{seed}",
            ["train", "configs/pocket.yaml", f"seed={seed}", f"output={out}/seed-{seed}", *more],
        )
        for seed in config.seeds
    ]
    jobs += [
        Job(
            f"target-{target:g}",
            [
                "train",
                "configs/pocket.yaml",
                f"target_sparsity={target}",
                f"output={out}/target-{target:g}",
                *more,
            ],
        )
        for target in config.targets
    ]
    common = [f"data={DATA}", f"n={config.problems}", "model=pocket", "window=4+16", "max_new_tokens=512"]
    common += ["slots=1024", "chunk=32768", f"device={config.device}", "dtype=float32"]
    everywhere = f"sparsities={','.join(map(str, config.sparsities))}"
    random = ["methods=random", f"random_masks={config.random_masks}"]
    ablation = [
        "methods=ablation",
        f"ablation_data={TRAIN}",
        "ablation_problems=192",
        everywhere,
        f"output={out}/eval-ablation",
    ]
    phenomenon = ["n=1024", f"output={out}", f"device={config.device}", "slots=1024"]
    jobs.append(Job("phenomenon", phenomenon, module="rlkv.pocket.check"))
    jobs.append(Job("eval-ablation", ["eval", *common, *ablation]))
    for seed in config.seeds:
        gates = ["methods=rlkv", f"gates={out}/seed-{seed}", everywhere, f"output={out}/eval-seed-{seed}"]
        jobs.append(Job(f"eval-seed-{seed}", ["eval", *common, *gates], after=f"seed-{seed}"))
    for sparsity in config.sparsities:
        name = f"eval-random-{sparsity:g}"
        jobs.append(Job(name, ["eval", *common, *random, f"sparsities={sparsity}", f"output={out}/{name}"]))
    return jobs


def run_all(jobs: list[Job], config: StudyConfig) -> dict[str, float]:
    """Seconds that each job took; stops with the log's end if one fails."""
    logs = config.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    waiting = list(jobs)
    running: dict[str, tuple[subprocess.Popen[bytes], int, float]] = {}
    took: dict[str, float] = {}
    while waiting or running:
        for name, (process, gpu, began) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            if process.returncode:
                for other, _, _ in running.values():
                    other.terminate()
                sys.exit(f"{name} failed:\n{(logs / name).read_text()[-3000:]}")
            took[name] = time.time() - began
            print(f"{name}: {took[name]:.0f} s on GPU {gpu}", flush=True)
        load_of = [sum(gpu == other for _, other, _ in running.values()) for gpu in range(config.gpus)]
        ready = next((job for job in waiting if not job.after or job.after in took), None)
        if ready is not None and min(load_of) < config.jobs_a_gpu:
            waiting.remove(ready)
            gpu = load_of.index(min(load_of))
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu), "OMP_NUM_THREADS": "4"}
            command = [sys.executable, "-m", ready.module, *ready.arguments]
            with (logs / ready.name).open("w") as log:
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            running[ready.name] = (process, gpu, time.time())
        else:
            time.sleep(0.2)
    return took


def merge(config: StudyConfig) -> dict[str, Any]:
    """One summary of all masks: RLKV's seeds under "rlkv-seed-1", ...; the rest under its method's name."""
    entries, rows, header = {}, {}, {}
    for folder in sorted(config.output.glob("eval-*")):
        results = json.loads((folder / "results.json").read_text())
        header = {key: results[key] for key in ("model", "shape", "data", "window", "prefill")}
        answers: dict[str, list[Any]] = {}
        for (mask, _), row in read_rows(folder / "rows.jsonl").items():
            answers.setdefault(mask, []).append(row)
        for path in sorted((folder / "masks").glob("*.json")):
            method, _, rest = path.stem.partition("-")
            seed = folder.name.removeprefix("eval-") if method == "rlkv" else ""
            name = f"{seed}-{path.stem}" if seed else path.stem
            label = f"RLKV, {seed.replace('-', ' ')}" if seed else method
            requested = float(rest.split("-")[0]) if rest else 0.0
            entries[name] = Entry(label, requested, name, HeadMask.load(path))
            rows[name] = sorted(answers[path.stem], key=lambda row: row.problem)
    order = sorted(entries.values(), key=lambda entry: (entry.requested, entry.method, entry.name))
    return {**header, **summarise(order, rows)}


def machine() -> dict[str, str]:
    """What it ran on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"device": device, "python": sys.version.split()[0], **versions}


def study(config: StudyConfig) -> None:
    """Everything, from nothing to table.md."""
    took = run_all(make_jobs(config), config)
    results = merge(config)
    landed = {}
    for target in config.targets:
        last = config.output / f"target-{target:g}" / "last"
        gates = HeadGates.load(last if last.is_dir() else last.parent)
        landed[f"{target:g}"] = gate_sparsity(gates.values)
    results |= {"seconds": took, "target_sparsity": landed, "machine": machine()}
    write_atomically(config.output / "results.json", json.dumps(results, indent=2) + "\n")
    write_atomically(config.output / "table.md", markdown(results))
    print(markdown(results), landed, sep="\n")


if __name__ == "__main__":
    study(load(StudyConfig, None, sys.argv[1:]))
