"""Packaging of RLKV's evaluation, installed beside the core: `pip install -e . -e eval`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "rlkv_eval/__init__.py").read_text()).group(1)

setup(
    name="rlkv-eval",
    version=VERSION,
    description="Evaluate KV-cache compression on reasoning: tasks, graders, baselines, statistics, tables",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["rlkv_eval", "rlkv_eval.*"]),
    entry_points={
        "console_scripts": ["rlkv-eval=rlkv_eval.cli:main", "rlkv-lm-eval=rlkv_eval.lm_eval_cli:main"]
    },
    install_requires=["rlkv", "datasets>=3.6"],
    extras_require={"lm-eval": ["lm-eval[hf]>=0.4.13"]},
)
