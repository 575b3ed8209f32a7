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

README = """
import sys
import torch
import transformers

folder, lines = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder + "/model", dtype="bfloat16")
transformers.AutoModelForCausalLM.from_pretrained = lambda name, dtype: model
inputs = {"input_ids": torch.randint(3, 40, (2, 120)), "attention_mask": torch.ones(2, 120, dtype=torch.long)}
for kind in ("ours", "authors", "duo"):
    exec(lines.replace("gates/llama-8b-r1", f"{folder}/{kind}"))
    assert gates.values.mean() < 1 and mask.sparsity == 5 / 9, kind
    assert mask.kv_bytes(length=32_768) == (4 * 32_768 + 5 * 80) * 2 * 8 * 2, kind
"""


def test_the_lines_of_the_readme_for_each_file_that_they_name(tmp_path: Path) -> None:
    ours = save_gates(tmp_path / "ours", save_model(tmp_path / "model"))
    for name, file in (("authors", "adapter_weights.tsv"), ("duo", "full_attention_heads.tsv")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text((ours / "gates.tsv").read_text())
    (tmp_path / "duo" / "config.json").write_text('{"sink_size": 128, "recent_size": 256}')
    lines = (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert "gates/llama-8b-r1" in lines and "import rlkv" in lines
    command = [sys.executable, "-c", README, str(tmp_path), lines]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_lines_of_the_design(tmp_path: Path) -> None:
    save_gates(tmp_path / "gates", save_model(tmp_path / "model"))
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    full, local, a_token = 4, 5, 2 * 8 * 4  # heads; bytes of a key and a value
    assert int(found.stdout.split()[-1]) == pytest.approx((full * 32_768 + local * 8) * a_token)
