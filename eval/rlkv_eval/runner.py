"""Run a plan: every answer is graded and written as soon as it is done, so a killed run goes on where it was.

    results = run(RunConfig(model="pocket", gates="gates/pocket", tasks=["pocket"], output="runs/pocket"))

Files are the same whether a run was killed in between, and whether it was one run or merged shards.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from threading import Lock
from typing import Any

import rlkv
import rlkv_eval
from rlkv.config import save as save_config
from rlkv.errors import RLKVError
from rlkv.mask import HeadMask
from rlkv_eval.backend import Answer, Backend, Session
from rlkv_eval.config import RunConfig
from rlkv_eval.graders.base import grade, grader_versions
from rlkv_eval.jobs import Job, Request
from rlkv_eval.plan import Plan, make_plan
from rlkv_eval.progress import Progress
from rlkv_eval.results import (
    MASK,
    ROWS,
    RUN,
    Results,
    Row,
    load_results,
    read_info,
    recover_rows,
    row_line,
    write_info,
    write_rows,
)

IN_THREADS = {"code", "math"}  # graders that wait for a process of their own
GRADING_THREADS = 4


def run(config: RunConfig, open_backend: Callable[[Plan], Backend] | None = None) -> Results:
    """Do what is missing of a configuration; returns all results in its output (or its shard's folder).

    ``open_backend`` replaces the model or server that the config names. Raises RLKVError for bad settings or
    input before a model is loaded, and if the output holds runs of other settings.
    """
    plan = make_plan(config)
    plan.root.mkdir(parents=True, exist_ok=True)
    save_config(config, plan.root / "config.yaml")
    todo = plan.unfinished()
    done = len(plan.jobs) - len(todo)
    print(f"{len(plan.jobs)} runs in {plan.root}" + (f", {done} of them done" if done else ""))
    if todo:
        backend = (open_backend or default_backend)(plan)
        for number, job in enumerate(todo, 1):
            run_job(plan, job, backend, f"[{done + number}/{len(plan.jobs)}] ")
    return load_results(plan.root)


def default_backend(plan: Plan) -> Backend:
    """The server that the config names, else the model, loaded here."""
    if plan.config.endpoint:
        from rlkv_eval.endpoint import Endpoint

        return Endpoint(plan)
    from rlkv_eval.local import Local

    return Local(plan)


def run_job(plan: Plan, job: Job, backend: Backend, prefix: str = "") -> None:
    """Answer what is missing of one job, then put its rows in their final order."""
    folder = plan.root / job.folder
    folder.mkdir(parents=True, exist_ok=True)
    skipped = backend.skipped(job)
    requests = plan.requests(job, set(skipped))
    session = backend.open(job)
    claim(folder, session.mask)
    write_info(folder, describe(plan, job, backend, session, len(requests), skipped))
    rows = {row.key: row for row in recover_rows(folder / ROWS)}
    missing = [request for request in requests if request.key not in rows]
    if missing:
        title = f"{prefix}{job.folder.as_posix()}"
        with (
            Progress(title, len(requests), list(rows.values())) as tick,
            Recorder(job, folder, tick) as record,
        ):
            session.answer(missing, record)
        rows |= {row.key: row for row in record.rows}
    lacking = [request.key for request in requests if request.key not in rows]
    if lacking:
        raise RLKVError(f"{folder}: {len(lacking)} answers are missing, such as {lacking[0]}: run it again")
    write_rows(folder / ROWS, rows.values())


class Recorder:
    """Grades answers and appends their rows; graders that wait do so in threads, so generation goes on."""

    def __init__(self, job: Job, folder: Path, tick: Callable[[Row], None]) -> None:
        self.job, self.tick, self.rows = job, tick, list[Row]()
        self.file = (folder / ROWS).open("a", encoding="utf-8")
        self.pool = ThreadPoolExecutor(GRADING_THREADS) if job.task.grader in IN_THREADS else None
        self.waiting: list[Future[None]] = []
        self.lock = Lock()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if self.pool:
                self.pool.shutdown(cancel_futures=error[0] is not None)
                for future in self.waiting if error[0] is None else ():
                    future.result()
        finally:
            self.file.close()

    def __call__(self, answer: Answer) -> None:
        if self.pool:
            self.waiting.append(self.pool.submit(self.record, answer))
        else:
            self.record(answer)

    def record(self, answer: Answer) -> None:
        """Grade and write one answer; a line is flushed whole."""
        row = make_row(self.job, answer)
        with self.lock:
            self.file.write(row_line(row))
            self.file.flush()
            self.rows.append(row)
            self.tick(row)


def make_row(job: Job, answer: Answer) -> Row:
    """The graded row of an answer."""
    request: Request = answer.request
    verdict = grade(job.task.grader, request.item, answer.text, answer.finish == "stop")
    return Row(
        id=request.item.id,
        sample=request.sample,
        task=job.task.name,
        method=job.method,
        sparsity=job.sparsity,
        seed=job.draw or 0,
        kind=verdict.kind,
        score=verdict.score,
        extracted=verdict.extracted,
        gold=request.item.answer,
        rule=verdict.rule,
        reason=verdict.reason,
        finish=answer.finish,
        prompt_tokens=answer.prompt_tokens,
        new_tokens=answer.new_tokens,
        kv_bytes=answer.kv_bytes,
        full_kv_bytes=answer.full_kv_bytes,
        text=answer.text,
    )


def claim(folder: Path, mask: HeadMask | None) -> None:
    """Record the mask; RLKVError if the rows that are there came from another one."""
    path = folder / MASK
    if mask is None:
        return
    old = HeadMask.load(path) if path.is_file() else mask
    if not old.full.equal(mask.full):
        raise RLKVError(
            f"{path} is another mask than this run's (other gates or scores?): choose another output"
        )
    mask.save(path)


def describe(
    plan: Plan, job: Job, backend: Backend, session: Session, answers: int, skipped: list[str]
) -> dict[str, Any]:
    """run.json. Nothing in it depends on how often the run was interrupted."""
    folder, config = plan.root / job.folder, plan.config
    made = versions(backend, job.task.grader)
    old = read_info(folder)["versions"] if (folder / RUN).is_file() else []
    return {
        "task": job.task.name,
        "title": job.task.title,
        "method": job.method,
        "sparsity": job.sparsity,
        "true_sparsity": session.true_sparsity,
        "seed": job.draw or 0,
        "repeat": job.repeat,
        "model": backend.model,
        **backend.facts,
        "window": str(plan.window),
        # token-dropping methods have no mask, and need the whole prompt's attention before they can drop
        "prefill": config.prefill if session.mask or config.endpoint else "full",
        "answers": answers,
        "shard": str(config.shard) if config.shard else None,
        "skipped": skipped,
        "seeds": {"sampling": plan.sampling_seed(job), "ties_and_draws": config.seed, "draw": job.draw},
        "settings": plan.settings(job),
        "versions": old if made in old else [*old, made],  # more than one if it went on elsewhere
    }


def versions(backend: Backend, grader: str) -> dict[str, str]:
    """What wrote and graded the rows."""
    found = {
        "rlkv": rlkv.__version__,
        "rlkv_eval": rlkv_eval.__version__,
        "python": platform.python_version(),
    }
    for name in ("torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | grader_versions(grader) | {"machine": backend.machine}
