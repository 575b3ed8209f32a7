"""Serving with a head mask on the released SGLang, as a plugin: nothing of SGLang is changed on disk.

SGLang finds ``plugin.register`` by its entry point. The plugin does nothing until the attention backend is
called ``rlkv``; how it works is told in docs/serving.md.
"""

TESTED = ("0.5.17",)  # releases of SGLang
