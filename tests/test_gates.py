"""Gates: every file format, exact round trips, and a sentence for every kind of bad file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from rlkv import HeadGates, RLKVError, Window
from rlkv.support import ModelShape, check_model

SHAPE = ModelShape(layers=3, query_heads=8, kv_heads=4, head_dim=16, model_type="qwen3", name="tiny")
SHARED = Path(os.environ.get("RLKV_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")

# shape and number of values outside [0, 1], counted with NumPy
PUBLISHED = {
    "rlkv/Llama-3.1-8B-R1": ((32, 8), 18),
    "rlkv/Qwen-2.5-7B-R1": ((28, 4), 1),
    "rlkv/Qwen-3-4B-Thinking": ((36, 8), 35 + 8),
    "duo_attn/Llama-3.1-8B-R1": ((32, 8), 8),
    "duo_attn/Qwen-2.5-7B-R1": ((28, 4), 0),
    "duo_attn/Qwen-3-4B-Thinking": ((36, 8), 6),
    "kvzip/Llama-3.1-8B-R1": ((32, 8), 0),
    "kvzip/Qwen-2.5-7B-R1": ((28, 4), 0),
    "kvzip/Qwen-3-4B-Thinking": ((36, 8), 0),
}


def config(**changes: int) -> Qwen3Config:
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    return Qwen3Config(hidden_size=64, intermediate_size=64, vocab_size=32, **{**sizes, **changes})


def random_gates(seed: int = 0) -> HeadGates:
    values = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed))
    values[0, 0], values[0, 1], values[2, 3] = 0.0, 1.0, 1e-30  # ends of the range and a value near underflow
    return HeadGates(values, window=Window(4, 16), model=SHAPE)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name: str) -> None:
    path = SHARED / "gates" / f"{name}.tsv"
    if not path.is_file():
        pytest.skip(f"published gates not found: {path} (set RLKV_SHARED_DATA)")
    gates, raw = HeadGates.load(path), np.loadtxt(path)
    shape, clipped = PUBLISHED[name]
    assert tuple(gates.values.shape) == shape == raw.shape
    assert gates.clipped == clipped == ((raw < 0) | (raw > 1)).sum()
    assert gates.values.dtype == torch.float32
    np.testing.assert_array_equal(gates.values.numpy(), raw.clip(0, 1).astype(np.float32))
    assert gates.stats()["mean"] == pytest.approx(raw.clip(0, 1).mean())
    assert gates.stats()["above_0.9"] == pytest.approx((raw > 0.9).mean())


def test_round_trip_is_exact(tmp_path: Path) -> None:
    gates = random_gates()
    gates.save(tmp_path / "run" / "gates", prefill="local", steps=7, reward=0.5, seed=3)
    loaded = HeadGates.load(tmp_path / "run" / "gates")
    assert torch.equal(loaded.values, gates.values)
    assert (loaded.window, loaded.model, loaded.clipped) == (Window(4, 16), SHAPE, 0)
    card = json.loads((tmp_path / "run/gates/card.json").read_text())
    assert card["model"] == "tiny" and card["model_type"] == "qwen3" and card["window"] == "4+16"
    assert (card["layers"], card["kv_heads"], card["query_heads"], card["head_dim"]) == (3, 4, 8, 16)
    assert (card["prefill"], card["steps"], card["reward"], card["seed"]) == ("local", 7, 0.5, 3)
    assert set(card["versions"]) >= {"rlkv", "torch", "transformers"}
    assert loaded.card == card


def test_card_survives_a_second_save(tmp_path: Path) -> None:
    random_gates().save(tmp_path, steps=7, seed=3)
    HeadGates.load(tmp_path).save(tmp_path, steps=8)
    assert {key: HeadGates.load(tmp_path).card[key] for key in ("steps", "seed")} == {"steps": 8, "seed": 3}


def test_table_alone_is_read_from_any_name(tmp_path: Path) -> None:
    random_gates().save(tmp_path)
    (tmp_path / "other.tsv").write_bytes((tmp_path / "gates.tsv").read_bytes())
    bare, full = HeadGates.load(tmp_path / "other.tsv"), HeadGates.load(tmp_path / "gates.tsv")
    assert torch.equal(bare.values, full.values)
    assert bare.model is None and full.model == SHAPE


def test_formats_of_others(tmp_path: Path) -> None:
    raw = np.array([[1.25, -0.5, 0.375], [0.0, 1.0, 0.5]])
    for name in ("adapter_weights.tsv", "full_attention_heads.tsv"):
        folder = tmp_path / name.removesuffix(".tsv")
        folder.mkdir()
        np.savetxt(folder / name, raw, delimiter="\t")
        (folder / "config.json").write_text(json.dumps({"sink_size": 128, "recent_size": 256}))
        gates = HeadGates.load(folder)
        assert gates.values.tolist() == [[1.0, 0.0, 0.375], [0.0, 1.0, 0.5]]
        assert gates.clipped == 2
    assert gates.window == Window(128, 256)  # DuoAttention's config records it


def test_model_given_on_load(tmp_path: Path) -> None:
    path = tmp_path / "bare.tsv"
    np.savetxt(path, np.full((3, 4), 0.5), delimiter="\t")
    gates = HeadGates.load(path, model=config())
    assert gates.model == check_model(config())
    with pytest.raises(RLKVError, match=r"3 layers x 4 KV heads.*qwen3.*5 layers x 4 KV heads"):
        HeadGates.load(path, model=config(num_hidden_layers=5))


def test_wrong_model_for_a_folder(tmp_path: Path) -> None:
    random_gates().save(tmp_path)
    with pytest.raises(RLKVError, match=r"another model: qwen3 \(tiny\).*head_dim 16; this.*head_dim 32"):
        HeadGates.load(tmp_path, model=config(head_dim=32))
    llama = LlamaConfig(
        num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, hidden_size=128, head_dim=16
    )
    with pytest.raises(RLKVError, match=r"another model: qwen3.*this model is llama"):
        HeadGates.load(tmp_path, model=llama)
    assert HeadGates.load(tmp_path, model=config()).model is not None


def test_changed_table(tmp_path: Path) -> None:
    random_gates().save(tmp_path)
    table = tmp_path / "gates.tsv"
    table.write_text(table.read_text().replace("1e-30", "0.5"))
    with pytest.raises(RLKVError, match="gates.tsv: its checksum is not the one in card.json"):
        HeadGates.load(tmp_path)


def test_table_that_contradicts_its_card(tmp_path: Path) -> None:
    random_gates().save(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps({**card, "layers": 9}))
    with pytest.raises(RLKVError, match=r"wrong shape: 3 layers x 4 KV heads.*9 layers"):
        HeadGates.load(tmp_path)
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(RLKVError, match="card.json: not valid JSON"):
        HeadGates.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5\t0.5\n0.5\tnan\n", r"row 2 \(layer 1\), column 2 \(KV head 1\) is nan"),
        ("0.5\t-inf\n", r"row 1 \(layer 0\), column 2 \(KV head 1\) is -inf"),
        ("0.5\t0.5\n0.5\n", "row 2 has 1 values, row 1 has 2"),
        ("0.5\thead\n", "row 1, column 2 is 'head', not a number"),
        ("\n\n", "the table is empty"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.tsv"
    path.write_text(text)
    with pytest.raises(RLKVError, match=f"bad.tsv: .*{message}"):
        HeadGates.load(path)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"window": 5}, "window: expected SINK.RECENT such as 16.64, got 5"),
        ({"deploy_window": [4, 16]}, r"window: expected SINK.RECENT such as 16.64, got \[4, 16\]"),
        ({"layers": "3", "query_heads": 4, "kv_heads": 4, "head_dim": 8}, "layers should be of type int"),
    ],
)
def test_bad_cards(tmp_path: Path, card: dict[str, Any], message: str) -> None:
    (tmp_path / "gates.tsv").write_text("1 1 1 1\n" * 3)
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(RLKVError, match=f"card.json: .*{message}"):
        HeadGates.load(tmp_path)


def test_bad_windows_of_duo_attention(tmp_path: Path) -> None:
    """A number that was written as text is meant; what is none is refused."""
    (tmp_path / "full_attention_heads.tsv").write_text("1 0\n0 1\n")
    config = tmp_path / "config.json"
    config.write_text('{"sink_size": "128", "recent_size": 256}')
    assert HeadGates.load(tmp_path).window == Window(128, 256)
    config.write_text('{"sink_size": null, "recent_size": 256}')
    with pytest.raises(RLKVError, match=r"config.json: window: expected SINK.RECENT .*got 'None.256'"):
        HeadGates.load(tmp_path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(
        RLKVError, match="looked for gates.tsv, adapter_weights.tsv, full_attention_heads.tsv"
    ):
        HeadGates.load(tmp_path)
    with pytest.raises(RLKVError, match="nowhere: no such file or folder; expected a gates folder or a .tsv"):
        HeadGates.load(tmp_path / "nowhere")


def test_bad_values() -> None:
    with pytest.raises(RLKVError, match=r"expected a table \[layers, kv_heads\], got shape \[4\]"):
        HeadGates(torch.ones(4))
    with pytest.raises(RLKVError, match="must be a finite number"):
        HeadGates(torch.tensor([[float("nan")]]))


def test_a_save_that_fails_leaves_the_old_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_gates(0).save(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        random_gates(1).save(tmp_path)
    assert torch.equal(HeadGates.load(tmp_path).values, random_gates(0).values)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.json", "gates.tsv"]


def test_values_are_a_copy_in_float32() -> None:
    source = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    gates = HeadGates(source)
    assert gates.values.dtype == torch.float32 and not gates.values.requires_grad
    assert torch.equal(HeadGates.ones(2, 2).values, gates.values)


def test_what_a_user_should_know() -> None:
    gates = HeadGates(torch.tensor([[1.25, 0.5], [-0.5, 1.0]]), window=Window(4, 16))
    assert gates.remarks(Window(4, 16)) == gates.remarks(None)
    clipped, window = gates.remarks(Window(4, 8))
    assert clipped == "2 of 4 gates lay outside [0, 1] and were clipped."
    assert window == "WARNING: gates trained with window 4+16 are used with 4+8."
    assert random_gates().remarks(Window(4, 16)) == []


def test_mask_takes_the_deployed_window() -> None:
    gates = random_gates()
    assert gates.mask(0.5).window == Window(4, 16)
    gates.card["deploy_window"] = "4+8"
    assert gates.mask(0.5).window == gates.deployed == Window(4, 8)
    mask = gates.mask(0.5, window=Window(16, 64), seed=5)
    assert (mask.window, mask.model, mask.seed, mask.requested) == (Window(16, 64), SHAPE, 5, 0.5)
    kept = set(gates.values.flatten().topk(6).indices.tolist())
    assert set(mask.full.flatten().nonzero().flatten().tolist()) == kept
