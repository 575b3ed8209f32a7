"""Packaging of RLKV's core. Tool settings (ruff, mypy, pytest) are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "rlkv/__init__.py").read_text()).group(1)
README = ROOT / "README.md"

DATASETS = "datasets>=3.6"

setup(
    name="rlkv",
    version=VERSION,
    description="Find the KV heads a reasoning model needs, by RL, and free the memory of the rest",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["rlkv", "rlkv.*"]),
    package_data={"rlkv.pocket": ["weights/*"]},
    entry_points={"console_scripts": ["rlkv=rlkv.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.2",
        "safetensors",
        "numpy",
        "rich",
        "pyyaml",
        "matplotlib",
        "tensorboard",
        "math-verify>=0.8",
        "antlr4-python3-runtime>=4.9.3,<=4.13.2",  # the LaTeX parser of math-verify
    ],
    extras_require={
        "train": [DATASETS],
        "eval": [DATASETS],
        "gpu": ["triton>=3.5; platform_system == 'Linux'"],
        "dev": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff>=0.14",
            "mypy>=1.18",
            "types-PyYAML",
            "triton>=3.9; platform_system == 'Linux'",  # its interpreter runs the kernels on a CPU
        ],
    },
)
