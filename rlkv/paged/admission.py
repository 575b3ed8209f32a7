"""Which waiting requests start now."""

from __future__ import annotations

from collections.abc import Hashable

from rlkv.paged.state import Job, Run
from rlkv.paged.tables import PageTables


def next_jobs(run: Run, tables: PageTables, slots: int, refill: int) -> list[Job]:
    """The next jobs, in order of arrival, whose pages are free while every live row may grow by a page.

    None while fewer than ``refill`` (or all that wait) could start: a prompt pass costs much the same for one
    and for many. Without live requests the first always starts.
    """
    page = tables.page_size
    budget = tables.pool.free
    for slot, live in run.live.items():
        budget -= tables.need_more(slot, min(live.at + page, live.job.most))
    chosen: list[Job] = []
    leaders: set[Hashable] = set()
    for job in run.waiting:
        if len(chosen) == slots - len(run.live):
            break
        length = len(job.tokens)
        need = tables.need(job.rows, min(length + page, job.most))
        if job.same in leaders:
            need -= tables.shared(job.rows, length)
        if need > budget and (chosen or run.live):
            break
        budget -= need
        leaders.add(job.same)
        chosen.append(job)
    enough = len(chosen) >= min(refill, len(run.waiting)) or not run.live
    return chosen if enough else []
