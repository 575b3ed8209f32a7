"""Where a decoding step of one request goes, kernel by kernel: the work `profile` of serve_sglang.py."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

PROMPT = 512
RECORDED = 0.15  # seconds


def profile(engine: Any) -> dict[str, Any]:
    """Kernels of some decoding steps in the middle of an answer."""
    with tempfile.TemporaryDirectory() as folder:
        engine.loop.run_until_complete(_record(engine, folder))
        for _ in range(60):  # the scheduler writes the file by itself
            if found := list(Path(folder).rglob("*.json.gz")):
                break
            time.sleep(0.5)
        time.sleep(1)
        with gzip.open(found[0], "rt") as file:
            events = json.load(file)["traceEvents"]
    return summary([event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")])


async def _record(engine: Any, folder: str) -> None:
    manager = engine.tokenizer_manager
    sampling = {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": 2000}
    request = asyncio.create_task(engine.async_generate(input_ids=[11] * PROMPT, sampling_params=sampling))
    await asyncio.sleep(1.0)
    from sglang.srt.managers.io_struct import ProfileReq, ProfileReqType

    options = {"output_dir": folder, "activities": ["GPU"], "with_stack": False, "record_shapes": False}
    await manager.start_profile(ProfileReq(req_type=ProfileReqType.START_PROFILE, **options))
    await asyncio.sleep(RECORDED)
    await manager.stop_profile()
    manager.abort_request(abort_all=True)
    await asyncio.wait([request], timeout=20)


def summary(kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """Microseconds of a step by kernel. A step goes from one launch of the longest of the kernels that a step
    launches once, the logits' product, to the next."""
    kernels = sorted(kernels, key=lambda event: event["ts"])
    names = [_short(event["name"]) for event in kernels]
    counts = Counter(names)
    rarest = min(count for count in counts.values() if count > 3)
    took = {name: kernel["dur"] for name, kernel in zip(names, kernels, strict=True)}
    marker = max((name for name in took if rarest <= counts[name] <= rarest + 2), key=took.__getitem__)
    starts = [index for index, name in enumerate(names) if name == marker]
    inner = range(starts[0], starts[-1])
    times: dict[str, list[float]] = defaultdict(list)
    for index in inner:
        times[names[index]].append(kernels[index]["dur"])
    whole = len(starts) - 1
    table = [
        {"kernel": name, "a_step": len(found) / whole, "us_a_step": sum(found) / whole}
        for name, found in times.items()
    ]
    table.sort(key=lambda row: -row["us_a_step"])
    return {
        "steps": whole,
        "us_a_step": (kernels[starts[-1]]["ts"] - kernels[starts[0]]["ts"]) / whole,
        "busy_us_a_step": sum(row["us_a_step"] for row in table),
        "kernels": table,
    }


def _short(name: str) -> str:
    """A kernel's name without its arguments, and not longer than a line."""
    return re.sub(r"\s+", " ", name.replace("(anonymous namespace)::", "").split("(")[0])[:90]
