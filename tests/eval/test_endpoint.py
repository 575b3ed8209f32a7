"""The server backend against a small HTTP server that counts, stalls and fails."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from eval_kit import config, make_task, tasks  # noqa: F401 (a fixture)

from rlkv.errors import RLKVError
from rlkv_eval import plan
from rlkv_eval.config import RunConfig
from rlkv_eval.endpoint import Client, choice_text, read_choice
from rlkv_eval.results import load_results
from rlkv_eval.runner import run

pytestmark = pytest.mark.usefixtures("tasks")


USAGE = {"usage": {"prompt_tokens": 7, "completion_tokens": 11}}


class Server(ThreadingHTTPServer):
    """``reply(body, how often this prompt was asked)`` gives (status, JSON or raw text, headers)."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply: Callable[[dict[str, Any], int], tuple[Any, ...]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.asked, self.bodies = reply, Counter[str](), list[dict[str, Any]]()
        self.paths, self.keys = Counter[str](), set[str | None]()
        self.busy = self.most = 0
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is what some tests want."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.send(200, {"data": [{"id": "served-model"}]})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = json.dumps(body.get("messages", body.get("prompt")))
        with server.lock:
            server.asked[prompt] += 1
            server.bodies.append(body)
            server.paths[self.path] += 1
            server.keys.add(self.headers.get("Authorization"))
            server.busy += 1
            server.most = max(server.most, server.busy)
            count = server.asked[prompt]
        reply = server.reply(body, count)
        with server.lock:  # before the client has its reply, and may ask again
            server.busy -= 1
        self.send(*reply)

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        if status == 0:  # hang up without a word
            self.close_connection = True
            return
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


def completion(text: str, finish: str = "stop", **message: Any) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 11}}


def right_or_cut(body: dict[str, Any], count: int) -> tuple[Any, ...]:
    """Problem 3 runs into the limit, problem 4 is wrong, all others are right."""
    number = int(body["messages"][0]["content"].split()[2].rstrip("?"))
    if number == 3:
        return 200, completion("on and on", "length")
    answer = number % 3 + (number == 4)
    return 200, completion(f"so {answer}", reasoning_content="hm")


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[..., tuple[Any, ...]]], Server]]:
    servers: list[Server] = []

    def start(reply: Callable[..., tuple[Any, ...]]) -> Server:
        servers.append(Server(reply))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "__init__", _hurried(Client.__init__))


def _hurried(made: Any) -> Any:
    def make(self: Client, *arguments: Any, **settings: Any) -> None:
        made(self, *arguments, **{"first_pause": 0.01, **settings})

    return make


def at(server: Server, output: Path, **changes: Any) -> RunConfig:
    values = {
        "model": "",
        "tasks": ["alpha"],
        "methods": ["rlkv"],
        "noise_floor": False,
        "endpoint": server.url,
    }
    return config(output, **(values | {"k": 1, "temperature": 0.0} | changes))


def test_rows_from_a_chat_server(tmp_path: Path, serve: Any) -> None:
    server = serve(right_or_cut)
    results = run(at(server, tmp_path))
    (found,) = results.runs
    assert found.name == "rlkv-s0.5" and found.info["model"] == "served-model"
    rows = {row.id: row for row in found.rows}
    assert len(rows) == 12 and found.accuracy == 10 / 12
    assert rows["alpha-3"].kind == "truncated" and rows["alpha-3"].finish == "length"
    assert rows["alpha-4"].kind == "wrong" and rows["alpha-5"].text == "hm</think>so 2"
    assert {(row.prompt_tokens, row.new_tokens, row.kv_bytes) for row in found.rows} == {(7, 11, None)}
    body = server.bodies[0]
    assert body["model"] == "served-model" and body["max_tokens"] == 100 and body["temperature"] == 0.0
    assert body["messages"] == [{"role": "user", "content": body["messages"][0]["content"]}]
    assert "seed" not in body and server.keys == {None}


def test_requests_run_together_but_not_too_many(tmp_path: Path, serve: Any) -> None:
    def slow(body: dict[str, Any], count: int) -> tuple[Any, ...]:
        time.sleep(0.05)
        return right_or_cut(body, count)

    server = serve(slow)
    run(at(server, tmp_path, concurrency=4, k=3, temperature=0.7))
    assert server.most == 4
    seeds = [body["seed"] for body in server.bodies]
    assert len(set(seeds)) == 36 and {body["top_p"] for body in server.bodies} == {1.0}
    again = serve(right_or_cut)
    run(at(again, tmp_path / "again", concurrency=1, k=3, temperature=0.7))
    assert sorted(body["seed"] for body in again.bodies) == sorted(seeds)


def test_what_fails_for_a_while_is_tried_again(tmp_path: Path, serve: Any) -> None:
    failures = [
        (500, "out of memory"),
        (429, "busy", {"Retry-After": "0.01"}),
        (200, "not json"),
        (200, {"choices": []}),
        (200, completion("x", "abort")),
        (200, {"choices": [{"text": "x", "finish_reason": "stop"}]}),  # no usage
        (0, ""),
    ]

    def flaky(body: dict[str, Any], count: int) -> tuple[Any, ...]:
        number = int(body["messages"][0]["content"].split()[2].rstrip("?"))
        return failures[number % len(failures)] if count <= 2 else right_or_cut(body, count)

    server = serve(flaky)
    assert run(at(server, tmp_path, retries=2)).runs[0].accuracy == 10 / 12
    assert set(server.asked.values()) == {3}


def test_a_failure_for_good_names_the_problem_and_the_run_goes_on_later(tmp_path: Path, serve: Any) -> None:
    healthy = threading.Event()

    def reply(body: dict[str, Any], count: int) -> tuple[Any, ...]:
        bad = body["messages"][0]["content"] == "what is 7?" and not healthy.is_set()
        return (503, "down") if bad else right_or_cut(body, count)

    server = serve(reply)
    settings = at(server, tmp_path, retries=1, concurrency=2)
    with pytest.raises(RLKVError, match=r"problem alpha-7: the server at .* failed 2 times, .*503: down"):
        run(settings)
    kept = len(load_results(tmp_path).runs[0].rows)
    assert 0 < kept < 12
    healthy.set()
    assert run(settings).runs[0].complete
    assert server.asked['[{"role": "user", "content": "what is 0?"}]'] == 1  # its row was kept


def test_a_refusal_is_not_tried_again(tmp_path: Path, serve: Any) -> None:
    server = serve(lambda body, count: (400, {"error": "prompt too long"}))
    with pytest.raises(RLKVError, match="refused the request: HTTP 400: .*prompt too long"):
        run(at(server, tmp_path, concurrency=1))
    assert set(server.asked.values()) == {1}


def test_a_server_that_stalls_times_out(tmp_path: Path, serve: Any) -> None:
    def stall(body: dict[str, Any], count: int) -> tuple[Any, ...]:
        time.sleep(1.0 if count == 1 else 0.0)
        return right_or_cut(body, count)

    server = serve(stall)
    assert run(at(server, tmp_path, timeout=0.3, n=2)).runs[0].complete
    assert set(server.asked.values()) == {2}


def test_completions_get_tokens_of_the_models_own_template(tmp_path: Path, serve: Any) -> None:
    from rlkv import pocket
    from rlkv.data import chat_tokens

    _, tokenizer = pocket.load()

    def reply(body: dict[str, Any], count: int) -> tuple[Any, ...]:
        choice = {"text": tokenizer.decode(body["prompt"][-3:]) + "1", "finish_reason": "stop"}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}

    server = serve(reply)
    extra = {"skip_special_tokens": False}
    settings = at(server, tmp_path, model="pocket", endpoint_api="completions", endpoint_extra=extra)
    results = run(settings)
    prompts = [body["prompt"] for body in server.bodies]
    expected = [chat_tokens(tokenizer, f"what is {number}?")[0] for number in range(12)]
    assert sorted(prompts) == sorted(expected)
    assert results.runs[0].accuracy == 4 / 12 and server.paths.keys() == {"/v1/completions"}
    assert all(body["skip_special_tokens"] is False for body in server.bodies)


def test_a_limit_on_prompt_and_answer_is_kept(
    tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = replace(make_task("alpha"), max_length=60)
    monkeypatch.setattr(plan, "get_task", lambda name: long)
    server = serve(lambda body, count: (200, {"choices": [{"text": "1", "finish_reason": "stop"}], **USAGE}))
    run(at(server, tmp_path / "a", endpoint_api="completions", model="pocket"))
    assert {len(body["prompt"]) + body["max_tokens"] for body in server.bodies} == {60}
    with pytest.raises(RLKVError, match="limits prompt and answer together .60 tokens"):
        run(at(server, tmp_path / "b"))


def test_the_key_comes_from_the_environment(
    tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(right_or_cut)
    with pytest.raises(RLKVError, match="SERVER_KEY, which is not set"):
        run(at(server, tmp_path, endpoint_key="SERVER_KEY"))
    monkeypatch.setenv("SERVER_KEY", "abc")
    run(at(server, tmp_path, endpoint_key="SERVER_KEY"))
    assert server.keys == {"Bearer abc"}
    assert "abc" not in "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_a_server_that_is_not_there(tmp_path: Path, serve: Any) -> None:
    server = serve(right_or_cut)
    settings = at(server, tmp_path, retries=1)
    server.shutdown()
    server.server_close()
    with pytest.raises(RLKVError, match="failed 2 times"):
        run(settings)


def test_thoughts_that_a_server_split_off_are_put_back() -> None:
    def text(**message: Any) -> str:
        return choice_text({"message": message})

    assert text(content="a") == "a" and text(content=None) == ""
    assert text(content="a", reasoning_content="t") == "t</think>a" == text(content="a", reasoning="t")
    assert text(content=None, reasoning_content="t") == "t"  # cut in the thought
    with pytest.raises(ValueError, match="content_filter"):
        read_choice(completion("", "content_filter"))
