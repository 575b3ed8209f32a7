"""The few lines that a user must remember work as they are written, in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_folder import save_gates, save_model

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
import torch
from transformers import AutoModelForCausalLM
import rlkv

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder + "/model")
inputs = {"input_ids": torch.randint(3, 40, (2, 120)), "attention_mask": torch.ones(2, 120, dtype=torch.long)}
inputs["attention_mask"][1, :70] = 0

gates = rlkv.HeadGates.load(folder + "/gates")
mask  = gates.mask(sparsity=0.5)
cache = rlkv.HeadwiseCache(model.config, mask, window=rlkv.Window(16, 64))
model.set_attn_implementation("rlkv")
model.generate(**inputs, past_key_values=cache, max_new_tokens=9, do_sample=False)
print(mask.kv_bytes(length=32_768))
held = mask.kv_bytes([128, 58], window=cache.window)
assert held <= cache.nbytes() < held + 2 * 2 * 64 * int(mask.full.sum()) * 2 * 8 * 4
"""


def test_the_lines_of_the_design(tmp_path: Path) -> None:
    save_gates(tmp_path / "gates", save_model(tmp_path / "model"))
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    full, local, a_token = 4, 5, 2 * 8 * 4  # heads; bytes of a key and a value
    assert int(found.stdout.split()[-1]) == pytest.approx((full * 32_768 + local * 8) * a_token)
