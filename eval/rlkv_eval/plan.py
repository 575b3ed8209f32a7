"""What a run consists of, worked out and checked before any model is loaded."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rlkv.bench import deployed_window, pick_dtype, trained_model
from rlkv.config import plain, unknown_key
from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.loading import load_shape
from rlkv.window import Window
from rlkv_eval.config import RunConfig
from rlkv_eval.graders.base import preflight
from rlkv_eval.jobs import Job, Request, digest, stream
from rlkv_eval.methods.base import get_method
from rlkv_eval.results import FULL, ROWS, RUN, read_info, read_rows
from rlkv_eval.tasks.base import Item, Task, get_task

CALIBRATED = ("kvzip", "ablation")  # methods that score heads on the calibration problems


@dataclass
class Plan:
    """All jobs of a configuration, with what they share."""

    config: RunConfig
    jobs: list[Job]
    gates: HeadGates | None
    model: str
    window: Window
    calibration: list[Item]

    @cached_property
    def root(self) -> Path:
        """Where this process writes."""
        output, shard = Path(self.config.output), self.config.shard
        return output / shard.folder if shard else output

    @property
    def work(self) -> Path:
        """Where head scores are kept; all shards share it, so that they are computed once."""
        return Path(self.config.output) / "work"

    def unfinished(self) -> list[Job]:
        """Jobs that lack answers. RLKVError if a folder holds a run with other settings."""
        return [job for job in self.jobs if not self.finished(job)]

    def finished(self, job: Job) -> bool:
        """Whether the job's folder holds all its answers; RLKVError if they come from other settings."""
        folder = self.root / job.folder
        if not (folder / RUN).is_file():
            return False
        info = read_info(folder)
        check_same(info.get("settings", {}), self.settings(job), folder)
        return len({row.key for row in read_rows(folder / ROWS)}) == info["answers"]

    def settings(self, job: Job) -> dict[str, Any]:
        """What decides the job's answers, and so must not change when it goes on."""
        config = self.config
        return {
            "model": self.model,
            "task": job.task.name,
            "problems": digest(job.items),
            "grader": job.task.grader,
            "method": job.method,
            "options": job.options,
            "sparsity": job.sparsity,
            "draw": job.draw,
            "gates": gates_digest(self.gates) if job.method == "rlkv" else None,
            "window": None if job.method == FULL else str(self.window),
            "prefill": None if job.method == FULL else config.prefill,
            "n": config.n,
            "k": config.k,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "max_new_tokens": self.max_new_tokens(job),
            "max_length": job.task.max_length,
            "seed": config.seed,
            "calibration": digest(self.calibration) if job.method in CALIBRATED else None,
            "dtype": None if config.endpoint else pick_dtype(config.dtype, config.device),
            "backend": config.endpoint_api if config.endpoint else "local",
            "endpoint_extra": plain(config.endpoint_extra),
        }

    def max_new_tokens(self, job: Job) -> int:
        """The limit on an answer: the config's, else the task's."""
        return self.config.max_new_tokens or job.task.max_new_tokens

    def requests(self, job: Job, skipped: set[str]) -> list[Request]:
        """The shard's share, in the order of asking; the repeat run asks in another order.

        Other neighbours in the batch change the last bits of the sums, as another method's runs do.
        """
        shard = self.config.shard
        items = [item for item in job.items if item.id not in skipped]
        found = [
            Request(item, sample, stream(item, sample))
            for item in (items[shard.index :: shard.count] if shard else items)
            for sample in range(self.config.k)
        ]
        if job.repeat:
            random.Random(self.config.seed).shuffle(found)
        return found

    def sampling_seed(self, job: Job) -> int:
        """All methods draw with the same random numbers; only the repeat run has its own."""
        return self.config.seed + job.repeat


def make_plan(config: RunConfig) -> Plan:
    """Load tasks and gates; RLKVError for what is wrong with them, the graders, the methods or the output."""
    config.check()
    tasks = [get_task(name) for name in dict.fromkeys(config.tasks)]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RLKVError(f"two of the tasks are called {twice}: name each once, and give files other names")
    check_server(config, tasks)
    preflight(task.grader for task in tasks)
    variants = method_variants(config)
    gates = HeadGates.load(config.gates) if config.gates else None
    model = config.model or (config.endpoint_model if config.endpoint else trained_model(gates))
    if gates and not config.endpoint:
        gates.check(load_shape(model))
    window = pick_window(config, gates, model)
    for line in gates.remarks(window) if gates else ():
        print(line)
    jobs = []
    for task in tasks:
        items = tuple(task_items(task, config.data_dir, config.n))
        jobs += [Job(task, items, *variant) for variant in variants]
    plan = Plan(config, jobs, gates, model, window, calibration_items(config, model, tasks))
    plan.unfinished()  # for its checks: another configuration's folder is refused before the model is loaded
    return plan


def planned_folders(config: RunConfig) -> set[Path]:
    """The folder of every run of a configuration, below its output."""
    tasks, variants = map(get_task, dict.fromkeys(config.tasks)), method_variants(config)
    return {Job(task, (), *variant).folder for task in tasks for variant in variants}


def check_server(config: RunConfig, tasks: list[Task]) -> None:
    """RLKVError for a task whose limit cannot be kept by a server that applies the template itself."""
    if not config.endpoint or config.endpoint_api != "chat" or config.max_new_tokens:
        return
    for task in tasks:
        if task.max_length:
            raise RLKVError(
                f"task {task.name} limits prompt and answer together ({task.max_length} tokens), and only a "
                "chat server counts the prompt: give endpoint_api=completions with model=, or max_new_tokens="
            )


def method_variants(config: RunConfig) -> list[tuple[str, dict[str, Any], float, int | None, bool]]:
    """(method, options, sparsity, draw, repeat) of every run of one task."""
    methods = list(dict.fromkeys(config.methods))
    for name in config.options:
        if name not in methods:
            raise RLKVError(unknown_key(f"options.{name}", [f"options.{method}" for method in methods]))
    if "rlkv" in methods and not (config.gates or config.options.get("rlkv") or config.endpoint):
        raise RLKVError("the method rlkv needs gates=FOLDER (trained by `rlkv train`, or published)")
    found: list[tuple[str, dict[str, Any], float, int | None, bool]] = []
    if FULL in methods or config.noise_floor:
        found += [(FULL, {}, 0.0, None, repeat) for repeat in (False, True)[: 1 + config.noise_floor]]
    for sparsity in sorted(set(config.sparsities)):
        for name in methods:
            if name == FULL:
                continue
            options = dict(config.options.get(name) or {})
            method = get_method(name, options)  # for its checks
            drawn = hasattr(method, "draw") and "draw" not in options and not config.endpoint
            draws: Sequence[int | None] = range(config.draws) if drawn else [None]
            found += [(name, options, sparsity, draw, False) for draw in draws]
    if config.endpoint and len({variant[0::2][:2] for variant in found}) > 1:
        raise RLKVError("a server has one cache: name one method and one sparsity, those that it runs with")
    if not found:
        raise RLKVError("no sparsities are named: give sparsities=0.25,0.5, say")
    return found


def task_items(task: Task, data_dir: str | None, n: int) -> list[Item]:
    """The first ``n`` problems (0: all); RLKVError when there are none or two have one id."""
    items = task.load(Path(data_dir) if data_dir else None)
    if not items:
        raise RLKVError(f"task {task.name} holds no problems")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise RLKVError(f"task {task.name}: two problems have the id {item.id!r}; ids must differ")
        seen.add(item.id)
    return items[:n] if n else items


def calibration_items(config: RunConfig, model: str, tasks: list[Task]) -> list[Item]:
    """Development problems for methods that score heads: never problems that are reported."""
    count = config.calibration_problems
    if not config.calibration:
        if model != "pocket":
            return []
        from rlkv.data import PromptSet

        problems = PromptSet.from_pocket("", "dev", count, config.seed).problems
        return [Item(each.id, each.prompt, each.answer, f"pocket_{each.task}") for each in problems]
    task = get_task(config.calibration)
    if task.name in {name for other in tasks for name in (other.name, other.subset_of)}:
        raise RLKVError(f"calibration={config.calibration} is among the tasks to report: choose another")
    # named as it was given, so that its grader can be found again
    return [replace(item, task=config.calibration) for item in task_items(task, config.data_dir, count)]


def pick_window(config: RunConfig, gates: HeadGates | None, model: str) -> Window:
    """The config's window, the gates', the pocket's; the full cache alone needs none."""
    if config.window or (gates and gates.deployed):
        return config.window or deployed_window(gates)
    if model == "pocket":
        from rlkv.pocket import WINDOW

        return WINDOW
    if set(config.methods) == {FULL} or config.endpoint:
        return Window(16, 64)
    return deployed_window(gates)


def check_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """Raise RLKVError, naming the setting, if a folder's run had another one."""
    name = first_difference(old, new)
    if name is not None:
        raise RLKVError(
            f"{folder} holds a run with {name}={old.get(name)}, now it is {new[name]}: choose another output"
        )


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first key of ``new`` whose value, as JSON has it, is another in ``old``."""
    return next((key for key, value in json.loads(json.dumps(new)).items() if old.get(key) != value), None)


def gates_digest(gates: HeadGates | None) -> str | None:
    """A fingerprint of the gates' values."""
    return hashlib.sha256(gates.values.numpy().tobytes()).hexdigest()[:16] if gates else None
