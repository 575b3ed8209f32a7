"""Answers from an OpenAI-compatible server (SGLang, vLLM, ...): /v1/chat/completions or /v1/completions.

The server runs with whatever cache it was started with; the run's one method and sparsity only name it. Chat:
the server applies the template. Completions: the prompt goes as tokens, made here with the template of
``model=``, so that no second BOS is added.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from rlkv.errors import RLKVError
from rlkv.mask import HeadMask
from rlkv_eval.backend import Answer
from rlkv_eval.jobs import Job, Request
from rlkv_eval.plan import Plan

FINISHES = {"stop": "stop", "length": "length"}
LONGEST_PAUSE = 60.0  # seconds between two tries


class Endpoint:
    """A server, reached once at the start for the name of its model; RLKVError when it cannot be."""

    machine = "endpoint"

    def __init__(self, plan: Plan) -> None:
        self.plan, config = plan, plan.config
        self.client = Client(
            config.endpoint or "", config.timeout, config.retries, key_of(config.endpoint_key)
        )
        self.served = config.endpoint_model or self.client.first_model()
        self.model = config.model or self.served
        self.facts: dict[str, Any] = {"endpoint": {"api": config.endpoint_api, "model": self.served}}
        self.tokenizer = load_tokenizer(config.model) if config.endpoint_api == "completions" else None

    def skipped(self, job: Job) -> list[str]:
        """None: the server refuses by name what it cannot hold."""
        return []

    def open(self, job: Job) -> EndpointSession:
        """Nothing to prepare."""
        return EndpointSession(self, job, job.sparsity)

    def body(self, request: Request, job: Job) -> tuple[str, dict[str, Any]]:
        """(path, JSON) of one request."""
        config = self.plan.config
        body: dict[str, Any] = {
            "model": self.served,
            "max_tokens": self.plan.max_new_tokens(job),
            "temperature": config.temperature,
        }
        if config.temperature > 0:
            body |= {"top_p": config.top_p, "seed": (request.stream + self.plan.sampling_seed(job)) % 2**31}
            if config.top_k:
                body["top_k"] = config.top_k
        if self.tokenizer is None:
            body["messages"] = [{"role": "user", "content": request.item.prompt}]
            return "chat/completions", body | config.endpoint_extra
        from rlkv.data import chat_tokens

        body["prompt"] = chat_tokens(self.tokenizer, request.item.prompt)[0]
        if job.task.max_length:
            body["max_tokens"] = max(1, min(body["max_tokens"], job.task.max_length - len(body["prompt"])))
        return "completions", body | config.endpoint_extra


@dataclass
class EndpointSession:
    """One job at the server."""

    endpoint: Endpoint
    job: Job
    true_sparsity: float
    mask: HeadMask | None = None

    def answer(self, requests: Sequence[Request], on_answer: Callable[[Answer], None]) -> None:
        """At most ``concurrency`` requests at a time; the first that fails for good ends the run."""
        pool = ThreadPoolExecutor(self.endpoint.plan.config.concurrency)
        try:
            for future in as_completed([pool.submit(self.ask, request) for request in requests]):
                on_answer(future.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, request: Request) -> Answer:
        """One answer; RLKVError when the server refuses or keeps failing."""
        path, body = self.endpoint.body(request, self.job)
        try:
            return read_answer(request, self.endpoint.client.post(path, body, read_choice))
        except RLKVError as error:
            raise RLKVError(f"problem {request.item.id}: {error}") from None


@dataclass
class Client:
    """JSON over HTTP. A request is tried again after a lost connection, a time-out, 408, 429, 5xx or a reply
    that makes no sense; pauses double from one second, or are as long as the server asks (Retry-After).
    """

    url: str
    timeout: float
    retries: int
    key: str = ""
    first_pause: float = 1.0

    def post(self, path: str, body: dict[str, Any] | None, read: Callable[[Any], Any]) -> Any:
        """``read`` of the reply's JSON; it raises ValueError or KeyError for one that makes no sense."""
        problem = ""
        for attempt in range(self.retries + 1):
            pause = min(self.first_pause * 2**attempt, LONGEST_PAUSE) * random.uniform(0.75, 1.25)
            try:
                return read(self.exchange(path, body))
            except urllib.error.HTTPError as error:
                text = error.read().decode(errors="replace")[:300]
                problem = f"HTTP {error.code}: {text}"
                if error.code not in (408, 429) and error.code < 500:
                    raise RLKVError(f"the server at {self.url} refused the request: {problem}") from None
                pause = retry_after(error.headers.get("Retry-After"), pause)
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                time.sleep(pause)
        raise RLKVError(f"the server at {self.url} failed {self.retries + 1} times, last with {problem}")

    def exchange(self, path: str, body: dict[str, Any] | None) -> Any:
        """One request (POST with a body, else GET) and its reply."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url.rstrip('/')}/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as reply:
            return json.loads(reply.read())

    def first_model(self) -> str:
        """The name of the model that the server lists first."""
        return self.post("models", None, lambda reply: str(reply["data"][0]["id"]))


def read_choice(reply: dict[str, Any]) -> dict[str, Any]:
    """The parts of a reply that are used; ValueError or KeyError if one is missing."""
    choice, usage = reply["choices"][0], reply["usage"]
    if choice.get("finish_reason") not in FINISHES:
        raise ValueError(f"finish_reason {choice.get('finish_reason')!r}")
    return {
        "text": choice_text(choice),
        "finish": FINISHES[choice["finish_reason"]],
        "prompt_tokens": int(usage["prompt_tokens"]),
        "new_tokens": int(usage["completion_tokens"]),
    }


def choice_text(choice: dict[str, Any]) -> str:
    """The completion; a thought that the server split off is put back before its answer."""
    if "message" not in choice:
        return str(choice["text"])
    message = choice["message"]
    thought = message.get("reasoning_content") or message.get("reasoning")
    content = message.get("content")
    if not thought:
        return content or ""
    return thought if content is None else f"{thought}</think>{content}"


def read_answer(request: Request, parts: dict[str, Any]) -> Answer:
    """The answer to a request; bytes of KV are the server's secret."""
    return Answer(request, **parts)


def retry_after(header: str | None, pause: float) -> float:
    """Seconds to wait as the server says, up to the longest pause; dates and nonsense are ignored."""
    try:
        return min(max(float(header or ""), 0.0), LONGEST_PAUSE)
    except ValueError:
        return pause


def key_of(variable: str) -> str:
    """The key in an environment variable; RLKVError if it is named but not set."""
    if variable and not os.environ.get(variable):
        raise RLKVError(f"endpoint_key names the environment variable {variable}, which is not set")
    return os.environ.get(variable, "") if variable else ""


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model by name."""
    from transformers import AutoTokenizer

    from rlkv.pocket import weights_folder

    try:
        return AutoTokenizer.from_pretrained(weights_folder() if name == "pocket" else name)
    except (OSError, ValueError) as error:
        raise RLKVError(
            f"the tokenizer of {name!r} could not be loaded: {str(error).splitlines()[0]}"
        ) from None
