"""What can't be served with a head mask, said at start-up and by the name of the option."""

from __future__ import annotations

from typing import Any

from rlkv.errors import RLKVError

BACKENDS = ("fa3", "triton", "torch_native")

# option -> (its harmless values, why not)
_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "speculative_algorithm": ((None,), "a rejected draft token can't be taken back out of a window"),
    "page_size": ((None, 1), "pages of several tokens would hold full heads only; leave it at 1"),
    "pp_size": ((1,), "pipeline stages would need a capacity of their own"),
    "dcp_size": ((1,), "it splits a sequence over ranks; a window stays on one"),
    "attn_cp_size": ((1,), "it splits a sequence over ranks; a window stays on one"),
    "enable_dp_attention": ((False,), "ranks would hold different requests"),
    "enable_hierarchical_cache": ((False,), "the windows of a cached prefix are not kept"),
    "enable_hisparse": ((False,), "it chooses tokens by itself"),
    "enable_lmcache": ((False,), "the windows of a stored prefix are not kept"),
    "enable_flexkv": ((False,), "the windows of a stored prefix are not kept"),
    "enable_prefill_cp": ((False,), "it splits a prompt over ranks; a window stays on one"),
    "kv_canary": (("none",), "it checks a KV pool of another layout"),
    "enable_session_radix_cache": ((False,), "the windows of a cached prefix are not kept"),
    "enable_streaming_session": ((False,), "a session's turns share a cache, but not a window"),
    "disaggregation_mode": (("null",), "only full heads would be sent from prefill to decode"),
    "enable_pdmux": ((False,), "it runs prefill and decode side by side on two attention backends"),
    "enable_two_batch_overlap": ((False,), "it runs two attention backends side by side"),
    "enable_unified_memory": ((False,), "it builds its own KV pool"),
    "enable_page_major_kv_layout": ((False,), "it builds its own KV pool"),
    "prefill_only_disable_kv_cache": ((False,), "there would be nothing to save"),
    "enable_lora": ((False, None), "adapters of Q, K, V and O are not permuted"),
    "dllm_algorithm": ((None,), "diffusion models decode whole blocks"),
    "weight_cache_mode": (("off",), "cached weights have their heads in the checkpoint's order"),
    "prefill_attention_backend": ((None,), "set RLKV_BACKEND instead"),
    "decode_attention_backend": ((None,), "set RLKV_BACKEND instead"),
    "allow_auto_truncate": ((False,), "it cuts prompts silently; shorten them, or raise RLKV_PROMPT_TOKENS"),
}
_LOAD_FORMATS = ("auto", "pt", "safetensors", "fastsafetensors", "npcache", "dummy", "runai_streamer")
_QUANTIZATIONS = (
    None,
    "awq",
    "awq_marlin",
    "compressed-tensors",
    "fp8",
    "gptq",
    "gptq_marlin",
    "modelopt_fp8",
    "w8a8_fp8",
    "w8a8_int8",
)


def check_options(options: Any, mixed: bool) -> None:
    """Raise RLKVError for the first option of ``options`` (ServerArgs) that rules a head mask out."""
    for name, (harmless, why) in _OPTIONS.items():
        value = getattr(options, name, harmless[0])
        if value not in harmless:
            raise RLKVError(f"attention backend rlkv can't run with {_flag(name)} {value}: {why}")
    if options.load_format not in _LOAD_FORMATS and not mixed:
        raise RLKVError(
            f"attention backend rlkv can't run with --load-format {options.load_format}: its weights can't "
            f"be permuted while they load; use one of {', '.join(_LOAD_FORMATS)}"
        )
    if not mixed:
        check_quantization(options.quantization)
    if options.kv_cache_dtype not in ("auto", "bf16", "bfloat16", "float16", "fp16"):
        raise RLKVError(
            f"attention backend rlkv can't run with --kv-cache-dtype {options.kv_cache_dtype}: windows are "
            "kept in the model's own dtype"
        )


def check_quantization(name: str | None) -> None:
    """Raise RLKVError unless tensors of this quantisation can be permuted; None: not quantised."""
    if name not in _QUANTIZATIONS:
        raise RLKVError(
            f"attention backend rlkv can't run with quantization {name}: nobody has checked that its tensors "
            "can be permuted by head"
        )


def check_prefill_graphs(options: Any) -> None:
    """Raise RLKVError if ``options``, as SGLang resolved them, have CUDA graphs for prefill."""
    backend = options.cuda_graph_config.prefill.backend
    if backend != "disabled":
        raise RLKVError(
            f"attention backend rlkv can't run with CUDA graphs for prefill ({backend}): windows are read "
            "where the prompts of a batch say, which a graph can't follow; leave out "
            "--cuda-graph-backend-prefill, and prefill in --cuda-graph-config"
        )


def check_backend(name: str | None) -> None:
    """Raise RLKVError unless full heads can be left to SGLang's backend ``name``."""
    if name not in BACKENDS:
        raise RLKVError(
            f"attention backend rlkv leaves full heads to one of {', '.join(BACKENDS)}, not to {name!r}: "
            "set RLKV_BACKEND"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
