"""Head scores that took long to compute, kept in a folder named after everything they depend on."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlkv.config import plain
from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv_eval.methods.base import Context, Method


def cached_scores(
    context: Context, method: Method, compute: Callable[[Path], HeadGates], **inputs: Any
) -> HeadGates:
    """What ``compute(folder)`` saved in ``context.work/<method>-<fingerprint>``, computed if it is not there.

    The fingerprint covers the method's settings, the model (shape, weights), the window and ``inputs``. A run
    killed in ``compute`` leaves no gates.tsv, so the next one computes again (or goes on, if it can). Of
    several processes (the shards of a run) one computes, and the others wait for it.
    """
    facts = {
        "method": method.name,
        "settings": plain(method),
        "model": context.shape.to_dict(),
        "weights": weights_digest(context.model),
        "window": str(context.window),
        **inputs,
    }
    text = json.dumps(facts, sort_keys=True)
    folder = context.work / f"{method.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        if not (folder / "gates.tsv").is_file():
            compute(folder).save(folder, fingerprint=facts)
    return HeadGates.load(folder, model=context.model)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process at a time; the kernel frees the folder when its holder ends, however it ends."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that computes {folder}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise RLKVError(f"{folder} cannot be locked ({error}): put the output on another disk") from None
        yield


def weights_digest(model: Any) -> str:
    """Twelve hex digits from the first 64 values of every parameter: two trainings of one shape differ."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        first = parameter.detach().flatten()[:64].float().cpu().contiguous()
        digest.update(first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def content_digest(texts: list[str]) -> str:
    """Twelve hex digits of a list of texts."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]
