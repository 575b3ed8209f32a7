"""The pocket reasoner's result: gates from three seeds and three targets, against random masks and ablation.

    python scripts/pocket_study.py output=docs/results/pocket gpus=1

Runs `rlkv train` and `rlkv eval` as processes, a few on each GPU at a time, then merges their answers into
results.json and table.md: every mask has answered the same held-out problems, so all comparisons are paired.
An interrupted study goes on where it was, and jobs whose result is there are not run again.
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

from rlkv.answers import Row, read_rows
from rlkv.cli import script
from rlkv.files import write_atomically
from rlkv.gates import HeadGates
from rlkv.mask import HeadMask
from rlkv.penalty import gate_sparsity
from rlkv.pocket.tasks import REASONING
from rlkv.report import Entry, difference, markdown, scores, summarise

DATA = "pocket:resolve+search+ledger+recall"  # recall is never trained on: it needs no thought

TRAIN = "pocket:resolve+search+ledger"


@dataclass
class StudyConfig:
    """``python scripts/pocket_study.py key=value ...``"""

    output: Path = Path("runs/study")  # folder for everything
    gpus: int = 1  # GPUs to use
    jobs_a_gpu: int = 1  # processes that share a GPU
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])  # a training run each
    targets: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])  # target sparsities, a run each
    target_steps: int = 110  # of a run towards a target sparsity
    sparsities: list[float] = field(default_factory=lambda: [0.25, 0.375, 0.5, 0.625])  # of the masks
    problems: int = 4096  # held-out problems, a quarter of each task
    random_masks: int = 8  # of each sparsity
    random_problems: int = 1024  # of those, answered under each random mask
    train: list[str] = field(default_factory=list)  # more settings for rlkv train
    device: str = "cuda"  # of every job


@dataclass
class Job:
    """One process: ``result`` is the file that it writes last, ``after`` the job whose result it needs."""

    name: str
    arguments: list[str]
    result: str
    after: str = ""
    module: str = "rlkv.cli"


def make_jobs(config: StudyConfig) -> list[Job]:
    """Training first, then what does not wait for it, then the evaluation of each seed."""
    out, on = config.output, f"device={config.device}"
    more = [on, "dtype=float32", "resume=true", *config.train]

    def train(name: str, settings: list[str]) -> Job:
        arguments = ["train", "configs/pocket.yaml", *settings, f"output={out}/{name}", *more]
        return Job(name, arguments, f"{name}/training.png")

    sparsities = f"sparsities={','.join(map(str, config.sparsities))}"
    common = [f"data={DATA}", "model=pocket", "window=4+16", "max_new_tokens=512", "slots=1024"]
    common += ["chunk=32768", on, "dtype=float32", sparsities]

    def evaluate(name: str, settings: list[str], after: str = "") -> Job:
        arguments = ["eval", *common, *settings, f"output={out}/{name}"]
        return Job(name, arguments, f"{name}/results.json", after)

    everything = f"n={config.problems}"
    ablation = [everything, "methods=ablation", f"ablation_data={TRAIN}", "ablation_problems=192"]
    random = [f"n={config.random_problems}", "methods=random", f"random_masks={config.random_masks}"]
    jobs = [train(f"seed-{seed}", [f"seed={seed}"]) for seed in config.seeds]
    jobs += [
        train(f"target-{target:g}", [f"target_sparsity={target}", f"steps={config.target_steps}"])
        for target in config.targets
    ]
    jobs.append(evaluate("eval-ablation", ablation))
    for seed in config.seeds:
        rlkv = [everything, "methods=rlkv", f"gates={out}/seed-{seed}"]
        jobs.append(evaluate(f"eval-seed-{seed}", rlkv, after=f"seed-{seed}"))
    jobs.append(evaluate("eval-random", random))
    phenomenon = ["n=1024", f"output={out}", on, "slots=1024"]
    jobs.append(Job("phenomenon", phenomenon, "phenomenon.json", module="rlkv.pocket.check"))
    return jobs


def run_all(jobs: list[Job], config: StudyConfig) -> dict[str, float]:
    """Seconds that each job took; stops with the log's end if one fails."""
    logs = config.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs if not (config.output / job.result).is_file()]
    done = {job.name for job in jobs} - {job.name for job in waiting}
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
            done.add(name)
            print(f"{name}: {took[name]:.0f} s on GPU {gpu}", flush=True)
        load_of = [sum(gpu == other for _, other, _ in running.values()) for gpu in range(config.gpus)]
        ready = next((job for job in waiting if not job.after or job.after in done), None)
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
    """One summary of all masks: RLKV's seeds under "RLKV, seed 1", ...; the rest under its method's name.

    Random masks answered fewer problems: they are summarised among themselves and listed beside the rest.
    """
    folders = sorted(config.output.glob("eval-*"))
    header = json.loads((folders[0] / "results.json").read_text())
    found = {key: header[key] for key in ("model", "shape", "data", "window", "prefill")}
    random = [folder for folder in folders if folder.name.startswith("eval-random")]
    entries, rows = collect([folder for folder in folders if folder not in random])
    results = {**found, **summarise(entries, rows), "rlkv_minus_ablation": margins(entries, rows)}
    drawn = summarise(*collect(random))
    for place, more in [(results["methods"], drawn["methods"])] + [
        (results["tasks"][task], drawn["tasks"][task]) for task in results["tasks"]
    ]:
        place += [summary for summary in more if summary["method"] == "random"]
        place.sort(key=lambda summary: summary["requested"])
    return results


def collect(folders: list[Path]) -> tuple[list[Entry], dict[str, list[Row]]]:
    """The masks of several evaluations, and each mask's rows in the order of the problems."""
    entries, rows = {}, {}
    for folder in folders:
        answers: dict[str, list[Row]] = {}
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
    return sorted(entries.values(), key=lambda entry: (entry.requested, entry.method, entry.name)), rows


def margins(entries: list[Entry], rows: dict[str, list[Row]]) -> dict[str, dict[str, Any]]:
    """Sparsity -> task -> paired difference of accuracy, mean of RLKV's seeds minus single-head ablation.

    The interval is for new seeds and new problems; "reasoning" is all problems that need a thought.
    """
    found: dict[str, dict[str, Any]] = {}
    for ablation in (entry for entry in entries if entry.method == "ablation"):
        seeds = [
            entry
            for entry in entries
            if entry.requested == ablation.requested and entry.method.startswith("RLKV")
        ]
        of_task = {task: [task] for task in REASONING} | {"reasoning": list(REASONING)}
        for name, tasks in of_task.items():
            chosen = {key: [row for row in group if row.task in tasks] for key, group in rows.items()}
            minus = difference(scores([ablation], chosen), scores(seeds, chosen))["minus"]
            found.setdefault(f"{ablation.requested:g}", {})[name] = minus
    return found


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
        folder = config.output / f"target-{target:g}"
        last = HeadGates.load(folder / "last" if (folder / "last").is_dir() else folder)
        card = HeadGates.load(folder).card  # of the gates that were kept
        landed[f"{target:g}"] = {
            "last": gate_sparsity(last.values),
            **{name: card[name] for name in ("steps", "sparsity", "validation_mask")},
        }
    results |= {"seconds": took, "target_sparsity": landed, "machine": machine()}
    write_atomically(config.output / "results.json", json.dumps(results, indent=2) + "\n")
    table = markdown(results) + "\n" + markdown_margins(results["rlkv_minus_ablation"])
    write_atomically(config.output / "table.md", table)
    print(table, landed, sep="\n")


def markdown_margins(found: dict[str, dict[str, Any]]) -> str:
    """Points of accuracy, RLKV (mean of seeds) minus single-head ablation, with 95 % intervals."""
    names = [*REASONING, "reasoning"]
    lines = ["**RLKV (mean of seeds) minus single-head ablation, points, paired**", ""]
    lines += ["| sparsity | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for sparsity, of_task in sorted(found.items(), key=lambda item: float(item[0])):
        cells = [
            f"{100 * of_task[name]['value']:+.1f} "
            f"[{100 * of_task[name]['low']:+.1f}, {100 * of_task[name]['high']:+.1f}]"
            for name in names
        ]
        lines.append(f"| {sparsity} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(script("python scripts/pocket_study.py", __doc__.splitlines()[0], StudyConfig, study))
