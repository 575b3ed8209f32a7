"""Join the shards of a run: the merged folder equals, byte for byte, that of one run over all problems."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rlkv.config import load as load_config
from rlkv.errors import RLKVError
from rlkv.files import write_atomically
from rlkv_eval.config import RunConfig
from rlkv_eval.plan import first_difference, planned_folders
from rlkv_eval.results import MASK, ROWS, RUN, Results, Row, load_results, load_run, write_info, write_rows

OWN = ("shard", "answers", "versions")  # what shards may differ in


def merge(output: str | Path) -> Results:
    """Write <output>/<task>/<run>/ from <output>/shard-*-of-n/, which stay; returns the merged results.

    RLKVError when a shard is missing, unfinished, or of other settings, and nothing is written then.
    """
    output = Path(output)
    shards = find_shards(output)
    names = sorted({path.parent.relative_to(shard) for shard in shards for path in shard.glob(f"*/*/{RUN}")})
    if not names:
        raise RLKVError(f"{output}: its shards hold no runs yet")
    for shard in shards:
        lacking = planned_folders(load_config(RunConfig, shard / "config.yaml")) - set(names)
        if lacking:
            raise RLKVError(f"{shard} has not begun {min(lacking)}: finish that shard first")
    joined = {name: join([shard / name for shard in shards]) for name in names}
    for name, (info, rows) in joined.items():
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        mask = shards[0] / name / MASK
        if mask.is_file():
            write_atomically(folder / MASK, mask.read_bytes())
        write_info(folder, info)
        write_rows(folder / ROWS, rows)
    return load_results(output)


def find_shards(output: Path) -> list[Path]:
    """shard-0-of-n, shard-1-of-n, ...; RLKVError unless they are there, once and complete."""
    found = {
        (int(match[1]), int(match[2])): path
        for path in output.glob("shard-*")
        if (match := re.fullmatch(r"shard-(\d+)-of-(\d+)", path.name))
    }
    counts = {count for _, count in found}
    if len(counts) != 1:
        what = "shards of several runs: " + ", ".join(sorted(path.name for path in found.values()))
        raise RLKVError(f"{output} holds {what if counts else 'no shards (of rlkv-eval run shard=0/2, say)'}")
    count = counts.pop()
    missing = [index for index in range(count) if (index, count) not in found]
    if missing:
        raise RLKVError(f"{output}: shard {missing[0]}/{count} is missing")
    return [found[index, count] for index in range(count)]


def join(folders: list[Path]) -> tuple[dict[str, Any], list[Row]]:
    """(run.json, rows) of one run from its shards' folders."""
    for folder in folders:
        if not (folder / RUN).is_file():
            raise RLKVError(f"{folder} is missing: finish that shard first")
    runs = [load_run(folder) for folder in folders]
    first = runs[0]
    for run in runs:
        if not run.complete:
            raise RLKVError(
                f"{run.folder} holds {len(run.rows)} of {run.info['answers']} answers: finish that shard"
            )
        name = first_difference(common(run.info), common(first.info))
        if name is not None:
            raise RLKVError(f"{run.folder} and {first.folder} differ in {name}: not shards of one run")
        masks = [folder / MASK for folder in (first.folder, run.folder)]
        if masks[0].is_file() and masks[0].read_bytes() != masks[1].read_bytes():
            raise RLKVError(f"{masks[1]} is another mask than {masks[0]}: the shards used other scores")
    info = dict(first.info)
    info["answers"] = sum(run.info["answers"] for run in runs)
    info["shard"] = None
    info["versions"] = [made for run in runs for made in run.info["versions"]]
    info["versions"] = [made for at, made in enumerate(info["versions"]) if made not in info["versions"][:at]]
    rows = [row for run in runs for row in run.rows]
    if len({row.key for row in rows}) < len(rows):
        raise RLKVError(f"the shards of {first.name} hold an answer twice")
    return info, rows


def common(info: dict[str, Any]) -> dict[str, Any]:
    """What all shards of a run have alike."""
    return {key: value for key, value in info.items() if key not in OWN}
