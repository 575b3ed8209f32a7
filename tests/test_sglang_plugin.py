"""The plugin's settings and refusals, and that it leaves SGLang alone when it should; no SGLang needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlkv import HeadGates, HeadMask, RLKVError, Window
from rlkv.support import ModelShape

sys.path.append(str(Path(__file__).parent.parent / "sglang"))
from rlkv_sglang import hooks, refusals  # noqa: E402
from rlkv_sglang.settings import Settings  # noqa: E402

SHAPE = ModelShape(layers=2, query_heads=8, kv_heads=4, head_dim=16, model_type="llama", context_length=4096)


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    values = torch.arange(8).reshape(2, 4) / 8
    return HeadGates(values, window=Window(4, 16), model=SHAPE).save(tmp_path / "gates")


def options(**changed: Any) -> SimpleNamespace:
    """SGLang's arguments, as far as they matter here."""
    plain = {
        "load_format": "auto",
        "quantization": None,
        "kv_cache_dtype": "auto",
        "disable_radix_cache": False,
    }
    return SimpleNamespace(**plain | {"device": "cpu", "attention_backend": "rlkv"} | changed)


def test_environment_overrides_the_file(tmp_path: Path, gates: Path) -> None:
    path = tmp_path / "rlkv.json"
    path.write_text(json.dumps({"gates": str(gates), "sparsity": 0.25, "window": "2+8"}))
    settings = Settings.read({"RLKV_CONFIG": str(path), "RLKV_SPARSITY": "0.5", "RLKV_PREFILL": "local"})
    plan = settings.plan(SHAPE)
    assert plan.mask.sparsity == 0.5 and plan.window == Window(2, 8) and plan.prefill == "local"
    assert plan.full_heads == (0, 4)


@pytest.mark.parametrize(
    "environment,sentence",
    [
        ({}, "set either RLKV_GATES"),
        ({"RLKV_GATES": "a", "RLKV_MASK": "b"}, "set either RLKV_GATES"),
        ({"RLKV_GATES": "a", "RLKV_SPARSITY": "half"}, "'sparsity': expected a number"),
        ({"RLKV_CONFIG": "/nowhere.json"}, "RLKV_CONFIG=/nowhere.json"),
    ],
)
def test_bad_settings_are_refused(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(RLKVError, match=sentence):
        Settings.read(environment)


def test_unknown_key_of_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rlkv.json"
    path.write_text('{"gate": "x"}')
    with pytest.raises(RLKVError, match="gate"):
        Settings.read({"RLKV_CONFIG": str(path)})


def test_masks_round_to_the_ranks(gates: Path) -> None:
    settings = Settings.read({"RLKV_GATES": str(gates), "RLKV_SPARSITY": "0.4"})
    assert all(full % 2 == 0 for full in settings.plan(SHAPE, tp=2).mask.per_layer())


@pytest.mark.parametrize(
    "changed,sentence",
    [
        ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm EAGLE: a rejected draft token"),
        ({"page_size": 64}, "--page-size 64"),
        ({"pp_size": 2}, "--pp-size 2"),
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache True"),
        ({"disaggregation_mode": "decode"}, "--disaggregation-mode decode"),
        ({"enable_lora": True}, "--enable-lora True"),
        ({"load_format": "gguf"}, "--load-format gguf"),
        ({"quantization": "mxfp4"}, "quantization mxfp4"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "--kv-cache-dtype fp8_e4m3"),
        ({"weight_cache_mode": "client"}, "--weight-cache-mode client: cached weights"),
        ({"weight_cache_mode": "daemon"}, "--weight-cache-mode daemon"),
    ],
)
def test_options_are_refused_by_name(changed: dict[str, Any], sentence: str) -> None:
    refusals.check_options(options(), mixed=False)
    with pytest.raises(RLKVError, match=sentence):
        refusals.check_options(options(**changed), mixed=False)


def test_backends_are_refused_by_name() -> None:
    refusals.check_backend("fa3")
    with pytest.raises(RLKVError, match="'flashinfer'"):
        refusals.check_backend("flashinfer")


def start(monkeypatch: pytest.MonkeyPatch, args: SimpleNamespace, **environment: str) -> SimpleNamespace:
    """What the first hook hands to SGLang."""
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    hooks.server_args(lambda given: None, args)
    return args


def test_another_backend_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    args = start(monkeypatch, options(attention_backend="fa3"))
    assert args == options(attention_backend="fa3")


def test_sparsity_zero_is_stock(monkeypatch: pytest.MonkeyPatch, gates: Path, tmp_path: Path) -> None:
    args = start(monkeypatch, options(), RLKV_GATES=str(gates), RLKV_SPARSITY="0")
    assert args == options(attention_backend=None)
    mask = HeadMask(torch.ones(2, 4, dtype=torch.bool)).save(tmp_path / "mask.json")
    monkeypatch.delenv("RLKV_GATES")
    assert start(monkeypatch, options(), RLKV_MASK=str(mask)) == options(attention_backend=None)


def test_without_sglang_it_says_so(monkeypatch: pytest.MonkeyPatch, gates: Path) -> None:
    monkeypatch.setattr("rlkv_sglang.plugin.version", lambda name: "0.9.9")
    monkeypatch.setattr("rlkv_sglang.plugin._resolve", lambda target: AttributeError("gone"))
    with pytest.raises(RLKVError, match=r"made for SGLang 0.5.17 and this is 0.9.9, .* \(gone\) and 11 more"):
        start(monkeypatch, options(), RLKV_GATES=str(gates))


@pytest.mark.parametrize(
    "left_out,sentence",
    [
        ("layers.1.", ""),  # its heads stay where they are
        (
            "layers.0.self_attn.o_proj",
            r"layers.0.self_attn.o_proj \(1 projections in all\) were not",
        ),
        ("self_attn", r"layers.0.self_attn.q_proj \(4 projections"),  # nothing was loaded that way
    ],
)
def test_weights_that_were_not_permuted_are_refused(gates: Path, left_out: str, sentence: str) -> None:
    settings = Settings.read({"RLKV_GATES": str(gates), "RLKV_SPARSITY": "0.25"})
    serving = hooks.Serving(settings, settings.plan(SHAPE), chunked=True)
    model = hooks.initialize_model(
        lambda config: SimpleNamespace(load_weights=list), SimpleNamespace(rlkv=serving)
    )
    model.load_weights(
        (name, torch.zeros(64, 64))
        for layer in range(2)
        for module in ("q_proj", "k_proj", "v_proj", "o_proj")
        if left_out not in (name := f"model.layers.{layer}.self_attn.{module}.weight")
    )
    if not sentence:
        return hooks.check_loaded(serving)
    with pytest.raises(RLKVError, match=sentence):
        hooks.check_loaded(serving)
