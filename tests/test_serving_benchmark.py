"""The serving benchmark's works, tables and profiles: what they make of given figures."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from serve_profile import summary
from serve_table import rows
from serve_work import WORKS, Work, measure


def test_the_steady_state_has_the_lengths_of_a_long_run() -> None:
    work = Work("steady", "100-300", "500-1500")
    found = work.under_way(1_000_000)
    held = sum(length for length, _ in found)
    assert 998_000 < held <= 1_000_000
    assert held / len(found) == pytest.approx(work.resident, rel=0.01)
    # brute force: one request after the other, each of its steps counts
    moments = [
        p + written for p in range(100, 301, 20) for o in range(500, 1501, 10) for written in range(0, o, 5)
    ]
    assert work.resident == pytest.approx(sum(moments) / len(moments), rel=0.01)
    assert all(rest >= 1 for _, rest in found)
    assert max(length + rest for length, rest in found) <= 1801


def test_lengths_are_spread_evenly() -> None:
    prompts, outputs = zip(*Work("batch", "256-1024", "100", requests=200).lengths(), strict=True)
    assert min(prompts) < 270 and max(prompts) > 1010 and sum(prompts) / 200 == pytest.approx(640, rel=0.01)
    assert set(outputs) == {100}


def test_the_memory_bound_work_is_of_long_requests() -> None:
    assert WORKS["bound"].resident >= 4096


class FakeEngine:
    """Writes 100 tokens at once, except that every 25th keeps one waiting for 20 ms."""

    tokenizer_manager = SimpleNamespace(model_config=SimpleNamespace(vocab_size=1000))

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()

    async def async_generate(self, sampling_params: dict[str, Any], **options: Any) -> AsyncIterator[Any]:
        async def stream() -> AsyncIterator[Any]:
            for count in range(1, 101):
                if count % 25 == 0:
                    await asyncio.sleep(0.02)
                if count % sampling_params["stream_interval"] == 0:
                    yield {"meta_info": {"completion_tokens": count}}

        return stream()


def test_one_slow_token_is_a_long_gap() -> None:
    found = measure(FakeEngine(), Work("poisson", "8", "100", requests=2, rate=1000), tokens=10_000)
    assert found["itl_ms"]["p99"] > 15 and found["itl_ms"]["p50"] < found["itl_ms"]["p99"] / 4


def test_table(tmp_path: Path) -> None:
    def write(name: str, speeds: list[float]) -> None:
        config = {
            "window": "16+64",
            "sparsity": 0.5,
            "prompt": "",
            "output": "",
            "requests": 0,
            "rate": 0,
            "seconds": 0,
        }
        results = [{"work": "bound", "tokens_per_second": speed, "running": 27.2} for speed in speeds]
        (tmp_path / f"{name}.json").write_text(json.dumps({"config": config, "results": results}))

    write("stock", [1000, 2000, 1100])
    write("0.5", [1900, 3600, 2310])
    header, stock, masked = rows(tmp_path)
    assert dict(zip(header, stock, strict=True))["x stock"] == "1.000"
    row = dict(zip(header, masked, strict=True))
    assert row["tokens/s"] == "2310" and row["x stock"] == "1.900" and row["runs"] == "1.800-2.100"
    assert row["at most"] == "1.96" and row["running"] == "27"


def test_profile_of_a_step() -> None:
    kernels = []
    for step in range(6):
        names = [("embed<int>(long)", 2.0), ("attend", 5.0), ("attend", 7.0), ("norm", 1.0)]
        for place, (name, took) in enumerate(names):
            kernels.append({"name": name, "ts": 100.0 * step + 10 * place, "dur": took})
    found = summary(kernels[2:])  # recording began in the middle of a step
    assert found["us_a_step"] == 100 and found["busy_us_a_step"] == 15
    attend = next(row for row in found["kernels"] if row["kernel"] == "attend")
    assert attend == {"kernel": "attend", "a_step": 2, "us_a_step": 12}
