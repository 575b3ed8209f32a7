"""The entry point that SGLang calls in each of its processes: hooks into its functions, and a backend's name.

All hooks do nothing unless the server was started with ``--attention-backend rlkv``, which the first of them
turns into SGLang's own backend for full heads and a mark on the arguments (``Serving`` on the model config in
the scheduler's process). A hook that SGLang could not apply is found out before anything is loaded.
"""

from __future__ import annotations

import logging
import pkgutil
from importlib.metadata import version
from typing import Any

from rlkv.errors import RLKVError
from rlkv_sglang import TESTED, hooks, updates

NAME = "rlkv"
logger = logging.getLogger(__name__)

_SRT = "sglang.srt"
AROUND = {
    f"{_SRT}.server_args.ServerArgs.__post_init__": hooks.server_args,
    f"{_SRT}.configs.model_config.ModelConfig.from_server_args": hooks.model_config,
    f"{_SRT}.model_loader.loader._initialize_model": hooks.initialize_model,
    f"{_SRT}.model_executor.model_runner_components.weight_updater.WeightUpdater"
    ".update_weights_from_tensor": updates.update_from_tensors,
    f"{_SRT}.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
    ".flush_cache_after_weight_update": updates.flush_after_update,
    f"{_SRT}.model_executor.pool_configurator.create_memory_pool_configurator": hooks.pool_configurator,
    f"{_SRT}.mem_cache.kv_cache_configurator.KVCacheConfigurator.resolve_max_num_reqs": hooks.max_requests,
    f"{_SRT}.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool": hooks.kv_pool,
    f"{_SRT}.model_executor.model_runner_components.attention_backend_setup"
    "._build_full_attention_backend_from_str": hooks.attention_backend,
    f"{_SRT}.model_executor.forward_batch_info.ForwardBatch.init_new": hooks.forward_batch,
    f"{_SRT}.models.utils.enable_fused_set_kv_buffer": hooks.fused_kv_store,
    f"{_SRT}.managers.utils.validate_input_length": hooks.input_length,
}


def register() -> None:
    """Called by SGLang's plugin loader; registers, and lets the loader apply the hooks."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for module in ("server_args", "arg_groups.choices"):  # where 0.5.17 and 0.5.23 keep them
        choices = _resolve(f"{_SRT}.{module}.ATTENTION_BACKEND_CHOICES")
        if isinstance(choices, list) and NAME not in choices:
            choices.append(NAME)
    register_attention_backend(NAME)(_not_active)
    for target, hook in AROUND.items():
        if not isinstance(_resolve(target), Exception):
            HookRegistry.register(target, hook, HookType.AROUND)


def _not_active(runner: Any) -> Any:
    """What remains of the backend's name if its first hook never ran."""
    raise RLKVError(_unknown_release(["sglang.srt.server_args.ServerArgs.__post_init__"]))


def check_installed() -> None:
    """Raise RLKVError naming the releases when a place that the plugin needs is not there, or not hooked."""
    missing = [target for target in AROUND if not hasattr(_resolve(target), "__wrapped__")]
    if missing:
        raise RLKVError(_unknown_release(missing))
    if version("sglang") not in TESTED:
        logger.warning("rlkv: tested with SGLang %s, not with %s", ", ".join(TESTED), version("sglang"))


def _unknown_release(missing: list[str]) -> str:
    found, more = _resolve(missing[0]), f" and {len(missing) - 1} more places" if missing[1:] else ""
    why = f" ({found})" if isinstance(found, Exception) else ""
    return (
        f"rlkv-sglang was made for SGLang {', '.join(TESTED)} and this is {version('sglang')}, where it "
        f"can't hook {missing[0]}{why}{more}; install sglang=={TESTED[-1]}"
    )


def _resolve(target: str) -> Any:
    """The function at a dotted path, or the error on the way there."""
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        return error
