"""Packaging of the SGLang plugin: ``pip install -e sglang/``, beside `rlkv` and a released `sglang`."""

from setuptools import setup

setup(
    name="rlkv-sglang",
    version="0.1.0",
    description="Serve a model with an RLKV head mask on the released SGLang",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["rlkv_sglang"],
    install_requires=["rlkv"],  # and sglang 0.5.17, which is installed to match the machine: docs/serving.md
    entry_points={"sglang.srt.plugins": ["rlkv = rlkv_sglang.plugin:register"]},
)
