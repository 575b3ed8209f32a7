"""Serving with a head mask on the released SGLang, as a plugin: nothing of SGLang is changed on disk.

SGLang finds ``plugin.register`` by its entry point. The plugin does nothing until the attention backend is
called ``rlkv``; how it works is told in docs/serving.md.
"""

from rlkv_sglang.gates import update_gates

__all__ = ["TESTED", "update_gates"]

TESTED = ("0.5.17",)  # releases of SGLang
