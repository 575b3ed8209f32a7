"""Head gates: one scalar in [0, 1] for each (layer, KV head), float32 (paper section 3.1).

A ``gates/`` folder holds ``gates.tsv`` (a row a layer, a column a KV head) and ``card.json`` (what they were
trained on and how). The authors' ``adapter_weights.tsv``, DuoAttention's ``full_attention_heads.tsv`` and a
bare TSV are read too; their values may lie slightly outside [0, 1] and are clipped.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rlkv.errors import RLKVError
from rlkv.files import write_atomically
from rlkv.mask import HeadMask
from rlkv.support import ModelShape, check_fit
from rlkv.window import Window

TABLES = ("gates.tsv", "adapter_weights.tsv", "full_attention_heads.tsv")
WINDOWS = ("window", "deploy_window")  # of a card: of training, and the one meant for use


@dataclass
class HeadGates:
    """Gates ``values`` float32 [layers, kv_heads] on the CPU, and what is known of their origin.

    Values outside [0, 1] are clipped and counted in ``clipped``; NaN and infinity raise RLKVError.
    """

    values: torch.Tensor
    window: Window | None = None  # of training
    model: ModelShape | None = None
    card: dict[str, Any] = field(default_factory=dict)
    clipped: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.values).detach().to("cpu", torch.float32)
        if values.ndim != 2 or not values.numel():
            raise RLKVError(f"gates: expected a table [layers, kv_heads], got shape {list(values.shape)}")
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise RLKVError(
                f"gates: row {row + 1} (layer {row}), column {column + 1} (KV head {column}) is "
                f"{values[row, column].item()}; every gate must be a finite number"
            )
        self.clipped = int(((values < 0) | (values > 1)).sum())
        self.values = values.clamp(0, 1)

    @classmethod
    def ones(
        cls, layers: int, heads: int, *, window: Window | None = None, model: ModelShape | None = None
    ) -> HeadGates:
        """The start of training: the base model."""
        return cls(torch.ones(layers, heads), window=window, model=model)

    @classmethod
    def load(cls, path: str | Path, *, model: Any = None) -> HeadGates:
        """Read a gates folder, a folder of the authors or of DuoAttention, or a TSV.

        With ``model`` (a model, config or ModelShape) the gates are checked against it, and take its shape if
        the file does not record one. Raises RLKVError: nothing found, ragged rows, not a number, NaN, another
        model, or a table that no longer matches its card.
        """
        table = _find_table(Path(path))
        content = table.read_bytes()
        values = _parse_table(content, table)
        card, window, shape = _read_origin(table)
        if card.get("sha256", digest := hashlib.sha256(content).hexdigest()) != digest:
            raise RLKVError(
                f"{table}: its checksum is not the one in card.json, so the table was changed or cut short; "
                "restore it, or copy the table alone elsewhere to read it as a bare TSV"
            )
        with _naming(table):
            gates = cls(values, window=window, model=shape, card=card)
            if shape is not None:
                check_fit("gates", values.shape, None, shape)
            if model is not None:
                gates.model = gates.check(model)
        return gates

    def check(self, model: Any) -> ModelShape:
        """The model's shape; raises RLKVError if these gates have another shape or were made for another."""
        return check_fit("gates", self.values.shape, self.model, model)

    def save(self, folder: str | Path, **extras: Any) -> Path:
        """Write ``gates.tsv`` and ``card.json``, each atomically; returns the folder.

        ``extras`` go into the card (prefill, config, steps, reward, seed, ...) over what it already holds.
        Nine digits keep every float32 exactly.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows = ("\t".join(f"{value:.9g}" for value in row) for row in self.values.tolist())
        content = ("\n".join(rows) + "\n").encode()
        card = {
            **self.card,
            **extras,
            **(_model_card(self.model) if self.model else {}),
            "window": str(self.window) if self.window else None,
            "versions": _versions(),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        write_atomically(folder / "gates.tsv", content)
        write_atomically(folder / "card.json", json.dumps(card, indent=2) + "\n")
        return folder

    @property
    def deployed(self) -> Window | None:
        """The window that the gates are meant for: the card's ``deploy_window``, else that of training."""
        named = self.card.get("deploy_window")
        return Window.parse(named) if named else self.window

    def remarks(self, window: Window | None) -> list[str]:
        """What a user should know before masks of these gates are used with ``window``; a line each."""
        lines = []
        if self.clipped:
            lines.append(
                f"{self.clipped} of {self.values.numel()} gates lay outside [0, 1] and were clipped."
            )
        if self.window and window and window != self.window:
            lines.append(f"WARNING: gates trained with window {self.window} are used with {window}.")
        return lines

    def mask(
        self,
        sparsity: float,
        *,
        seed: int = 0,
        rounding: str = "global",
        tp: int = 1,
        window: Window | None = None,
    ) -> HeadMask:
        """Keep the (1 - sparsity) of heads with the highest gates full; see :meth:`HeadMask.from_scores`.

        ``window`` defaults to ``deployed``.
        """
        return HeadMask.from_scores(
            self.values,
            sparsity,
            seed=seed,
            rounding=rounding,
            tp=tp,
            window=window or self.deployed,
            model=self.model,
        )

    def stats(self) -> dict[str, float]:
        """Mean, standard deviation (of the population), extremes, and fractions below 0.1 and above 0.9."""
        values = self.values.double()
        return {
            "mean": values.mean().item(),
            "std": values.std(correction=0).item(),
            "min": values.min().item(),
            "max": values.max().item(),
            "below_0.1": (values < 0.1).double().mean().item(),
            "above_0.9": (values > 0.9).double().mean().item(),
        }


def _find_table(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        for name in TABLES:
            if (path / name).is_file():
                return path / name
        raise RLKVError(f"{path}: no gates in this folder; looked for {', '.join(TABLES)}")
    raise RLKVError(f"{path}: no such file or folder; expected a gates folder or a .tsv")


def _parse_table(content: bytes, table: Path) -> torch.Tensor:
    """Float32 [rows, columns] of a table without header, split at white space."""
    rows = [line.split() for line in content.decode(errors="replace").splitlines() if line.strip()]
    if not rows:
        raise RLKVError(f"{table}: the table is empty")
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise RLKVError(f"{table}: row {number} has {len(row)} values, row 1 has {len(rows[0])}")
        for column, text in enumerate(row, 1):
            try:
                float(text)
            except ValueError:
                raise RLKVError(f"{table}: row {number}, column {column} is {text!r}, not a number") from None
    return torch.tensor([[float(text) for text in row] for row in rows], dtype=torch.float32)


def _read_origin(table: Path) -> tuple[dict[str, Any], Window | None, ModelShape | None]:
    """Card, window and model shape from the JSON beside a table: our card, or DuoAttention's config."""
    if table.name == "gates.tsv":
        path = table.with_name("card.json")
        card = _read_json(path)
        with _naming(path):
            windows = {key: Window.parse(card[key]) for key in WINDOWS if card.get(key)}
            shape = (
                ModelShape.from_dict({**card, "name": card.get("model", "")}) if "layers" in card else None
            )
        return card, windows.get("window"), shape
    path = table.with_name("config.json")
    config = _read_json(path) if table.name == TABLES[2] else {}
    if "sink_size" in config and "recent_size" in config:
        with _naming(path):
            return {}, Window.parse(f"{config['sink_size']}+{config['recent_size']}"), None
    return {}, None, None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file an RLKVError is about."""
    try:
        yield
    except RLKVError as error:
        raise RLKVError(f"{path}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RLKVError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise RLKVError(f"{path}: expected a JSON object")
    return record


def _model_card(shape: ModelShape) -> dict[str, Any]:
    record = shape.to_dict()
    return {"model": record.pop("name"), **record}


def _versions() -> dict[str, str]:
    from rlkv import __version__

    return {
        "rlkv": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers")},
    }
