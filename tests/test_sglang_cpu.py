"""The pocket reasoner served by SGLang's CPU engine with a head mask: greedy tokens equal our sampler's.

The pool is small, prompts are processed in chunks, requests are retracted and aborted, and memory given back
is filled with NaN. Skipped where SGLang is not installed; docs/serving.md says how to, without a GPU.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from serving_prompts import pocket_prompts

from rlkv import pocket
from rlkv.loading import load_shape
from rlkv.mask import HeadMask
from rlkv.sampler import Sampler, SamplingParams

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not list(distributions(name="sglang")), reason="SGLang is not installed")
LONGEST = 300  # new tokens


@dataclass
class Server:
    url: str
    mask: HeadMask
    prefill: Literal["full", "local"]
    log: Path

    def post(self, path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read() or b"null")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            content = answer.read()
            return json.loads(content) if content else None


def server_environment() -> dict[str, str]:
    """SGLang's CPU engine and our plugin, on one core."""
    paths = [
        str(ROOT / "tests/sglang_stubs"),
        str(ROOT),
        str(ROOT / "sglang"),
        os.environ.get("PYTHONPATH", ""),
    ]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def start(
    folder: Path, prefill: Literal["full", "local"], *options: str, tp: int = 1, **settings: str
) -> tuple[subprocess.Popen[bytes], Server]:
    """A server on a free port, and the mask it uses."""
    shape = load_shape("pocket")
    mask = HeadMask.random(shape.layers, shape.kv_heads, 0.5, 5, window=pocket.WINDOW, model=shape, tp=tp)
    mask.save(folder / "mask.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = server_environment() | {
        "RLKV_MASK": str(folder / "mask.json"),
        "RLKV_PREFILL": prefill,
        "RLKV_POISON": "true",
        "SGLANG_TEST_RETRACT": "1",
        "SGLANG_TEST_RETRACT_INTERVAL": "50",
        **settings,
    }
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(pocket.weights_folder())]
    command += ["--port", str(port), "--device", "cpu", "--attention-backend", "rlkv", "--dtype", "float32"]
    command += ["--sampling-backend", "pytorch", "--grammar-backend", "none", "--mem-fraction-static", "0.3"]
    command += ["--max-total-tokens", "2500", "--max-running-requests", "16", "--chunked-prefill-size", "48"]
    command += ["--skip-server-warmup", "--tp-size", str(tp), *options]
    log = folder / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    return process, Server(f"http://127.0.0.1:{port}", mask, prefill, log)


@contextmanager
def running(
    folder: Path, prefill: Literal["full", "local"], *options: str, tp: int = 1, **settings: str
) -> Iterator[Server]:
    """A server that answers; it ends with the context."""
    process, server = start(folder, prefill, *options, tp=tp, **settings)
    try:
        for _ in range(300):
            assert process.poll() is None, server.log.read_text()[-3000:]
            try:
                server.get("/health")
                break
            except OSError:
                time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module", params=["full", "local"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    mixed = ("--enable-mixed-chunk",) if request.param == "full" else ()  # tests/test_sglang_tp.py: reversed
    with running(tmp_path_factory.mktemp("served"), request.param, *mixed) as server:
        yield server


def compare(server: Server, count: int) -> None:
    """Serve ``count`` prompts at once, a fifth as many more that are aborted; compare with the sampler."""
    prompts = pocket_prompts(count)
    sampling = {"temperature": 0, "max_new_tokens": LONGEST}

    def ask(index: int) -> list[int]:
        answer = server.post("/generate", {"input_ids": prompts[index], "sampling_params": sampling})
        ids: list[int] = answer["output_ids"]
        return ids

    def abort(index: int) -> None:
        body = {"input_ids": prompts[index], "sampling_params": sampling, "rid": f"abort-{index}"}
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.post, "/generate", body)
            time.sleep(0.3 + 0.37 * (index % 7))
            server.post("/abort_request", {"rid": f"abort-{index}"})
            asked.result()

    with ThreadPoolExecutor(64) as pool:
        answers = [pool.submit(ask, index) for index in range(count)]
        aborted = [pool.submit(abort, index) for index in range(0, count, 5)]
        got = [answer.result() for answer in answers]
        for one in aborted:
            one.result()
    model, _ = pocket.load()
    window, prefill = server.mask.window, server.prefill
    assert window is not None
    sampler = Sampler(model, window, slots=32, max_length=1000, prefill=prefill)
    expected = sampler.generate(
        prompts, SamplingParams(max_new_tokens=LONGEST, temperature=0), gates=server.mask.gates()
    )
    different = [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b.tokens]
    assert not different, f"{len(different)} of {count} answers differ, the first is {different[0]}"
    log = server.log.read_text()
    assert re.search(r"#retracted_reqs: [1-9]", log), "nothing was retracted"
    assert "leak" not in log
    time.sleep(1)
    state = server.get("/get_load")
    assert all(one["num_tokens"] == 0 for one in state), state


def test_tokens_are_the_samplers(server: Server) -> None:
    compare(server, 20)


@pytest.mark.slow
def test_tokens_of_200_prompts_are_the_samplers(server: Server) -> None:
    compare(server, 200)


def test_openai_chat(server: Server) -> None:
    problem = pocket.problems("resolve", "test", 1)[0]
    body = {"model": "pocket", "messages": [{"role": "user", "content": problem["prompt"]}]}
    answer = server.post("/v1/chat/completions", body | {"temperature": 0, "max_tokens": 40})
    assert answer["usage"]["completion_tokens"] > 0 and answer["choices"][0]["message"]["content"]


def test_updates_are_permuted_or_refused(server: Server) -> None:
    """The same weights, sent again: nothing may change, unless they came in another order unseen."""
    prompts = {"input_ids": pocket_prompts(4), "sampling_params": {"temperature": 0, "max_new_tokens": 24}}

    def update(weights: dict[str, torch.Tensor], load_format: str | None = None) -> str:
        payload = base64.b64encode(pickle.dumps(list(weights.items()))).decode()
        body = {"serialized_named_tensors": [payload], "load_format": load_format}
        time.sleep(0.5)  # SGLang wants an idle server
        try:
            found = server.post("/update_weights_from_tensor", body)
        except urllib.error.HTTPError as error:
            found = json.loads(error.read())
        assert [answer["output_ids"] for answer in server.post("/generate", prompts)] == before
        return str(found["message"])

    before = [answer["output_ids"] for answer in server.post("/generate", prompts)]
    model, _ = pocket.load()
    weights = {name: weight.data for name, weight in model.named_parameters() if "self_attn" in name}
    assert update(weights) == "Success"
    names = [[f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkv"] for layer in range(6)]
    fused = {name[0].replace("q_proj", "qkv_proj"): torch.cat([weights[n] for n in name]) for name in names}
    assert "would leave heads in the checkpoint's order" in update(fused, "direct")
    spoiled = {names[0][0]: 0 * weights[names[0][0]]}
    assert "fused QKV checkpoints can't be permuted" in update(spoiled | fused)


def test_the_plan_is_in_the_log(server: Server) -> None:
    log = server.log.read_text()
    heads = server.mask.full.numel()
    assert f"{heads // 2} of {heads} KV heads full" in log and "windows of 16 requests" in log


@pytest.mark.parametrize(
    "options,settings,sentence",
    [
        (["--page-size", "16"], {}, "can't run with --page-size 16"),
        (["--speculative-algorithm", "NGRAM"], {}, "can't run with --speculative-algorithm NGRAM"),
        ([], {"RLKV_MASK": "", "RLKV_GATES": ""}, "set either RLKV_GATES"),
        ([], {"RLKV_BACKEND": "flashinfer"}, "leaves full heads to one of fa3, triton, torch_native"),
    ],
)
def test_refusals(tmp_path: Path, options: list[str], settings: dict[str, str], sentence: str) -> None:
    process, server = start(tmp_path, "full", *options, **settings)
    assert process.wait(120) != 0
    assert sentence in server.log.read_text()


def test_what_sglang_makes_of_its_arguments_is_checked(tmp_path: Path) -> None:
    """Prefill graphs and quantisation that only the resolved arguments show, and the context asked for."""
    shape = load_shape("pocket")
    mask = HeadMask.random(shape.layers, shape.kv_heads, 0.5, window=pocket.WINDOW, model=shape)
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    for file in pocket.weights_folder().iterdir():
        (quantised / file.name).symlink_to(file)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").unlink()
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (quantised / "config.json").write_text(json.dumps(config))
    script = f"""
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs

def resolve(**options):
    plain = dict(model_path={str(pocket.weights_folder())!r}, attention_backend="rlkv", device="cpu")
    plain |= dict(dtype="float32", sampling_backend="pytorch", grammar_backend="none")
    try:
        return ServerArgs(**plain | options)
    except Exception as error:
        print("REFUSED", error)

resolve(cuda_graph_backend_prefill="breakable")
resolve(cuda_graph_config={{"prefill": {{"backend": "full"}}}})
resolve(model_path={str(quantised)!r})
args = resolve(context_length=300, chunked_prefill_size=48)
print("STAGING", args.get_model_config().rlkv.staging, args.cuda_graph_config.prefill.backend)
"""
    environment = server_environment() | {"RLKV_MASK": str(mask.save(tmp_path / "mask.json"))}
    environment["RLKV_BACKEND"] = "triton"  # SGLang turns graphs off with torch_native
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    said = [line for line in run.stdout.splitlines() if line.startswith(("REFUSED", "STAGING"))]
    assert len(said) == 4, run.stderr[-3000:]
    assert "CUDA graphs for prefill (breakable)" in said[0] and "CUDA graphs for prefill (full)" in said[1]
    assert "quantization mxfp4" in said[2] and said[3] == "STAGING 300 disabled"
