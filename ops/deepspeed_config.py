"""DeepSpeed's configuration: what the engine relies on, with the user's `engine.deepspeed` merged in where it is free.

Free is what changes speed or what is reported: bucket sizes, overlap, ZeRO 3's prefetching and persistence, profilers,
timers, monitors. Refused is what a field of the recipe already says (batch, rates, clip, precision, stage: two sources
of one number drift apart), what would move masters or gradients away from where ops/zero looks for them (offload,
ZenFlow, quantised or secondary partitions, reordering and padding), what would average gradients another way, and what
another part of Gristmill does (data, checkpoints, elasticity). FREE and REFUSED below are the whole list; a test holds
that they cover all that the installed DeepSpeed reads.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from ..shards.errors import GristmillError, nearest
from .launch import quiet_deepspeed

WHERE = "engine.deepspeed"
MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
FLOPS = ("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file")
SWITCHES = ("wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc")
FREE = {"zero_optimization", "comms_logger", "flops_profiler", "timers", "log_level", *SWITCHES, *MONITORS}
FREE_ZERO = {
    "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce", "contiguous_gradients", "overlap_comm",
    "allgather_partitions", "allgather_bucket_size", "ignore_unused_parameters", "enable_sanity_checks",
    # ZeRO 3
    "sub_group_size", "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold",
    "max_live_parameters", "max_reuse_distance", "module_granularity_threshold", "use_all_reduce_for_fetch_params",
    "allgather_sequential", "leaf_module", "memory_efficient_linear", "override_module_apply", "log_trace_cache_warnings",
}  # fmt: skip

_RATES = "rates follow the position: set optimizer.lr, optimizer.min_lr and optimizer.warmup instead"
_PRECISION = "set precision to fp32, autocast or bf16 instead"
_AVERAGE = "gradients are averaged once, in fp32, over all ranks; leave it out"
_LAYOUT = "not supported by the segments table, which finds masters and gradients by where DeepSpeed lays them out; leave it out"
_FILES = "Gristmill writes its own checkpoints: set checkpoint.every, checkpoint.keep and checkpoint.store instead"
_DATA = "Gristmill's own stream feeds the run: set views, stream and batch instead"
_PARALLEL = "runs are data parallel: set engine.zero to share weights between ranks instead"
_COUNT = "set batch (images a step, over all ranks) and engine.accumulate (micro-batches a step) instead"
_GONE = "DeepSpeed no longer has it; leave it out"
REFUSED = {
    "train_batch_size": _COUNT,
    "train_micro_batch_size_per_gpu": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "managed_gradient_accumulation": _COUNT,
    "optimizer": "set optimizer.name and the fields beside it instead",
    "scheduler": _RATES,
    "gradient_clipping": "set optimizer.clip and optimizer.clip_by instead",
    "zero_allow_untested_optimizer": "Gristmill sets it; leave it out",
    "zero_force_ds_cpu_optimizer": "no offload here, so it has no use; leave it out",
    "steps_per_print": "progress is in the run's log and metrics (metrics.port); leave it out",
    "fp16": f"fp16 would need loss scaling, which skips steps by its own count; {_PRECISION}",
    "amp": f"{_GONE.split(';')[0]}; {_PRECISION}",
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "torch_autocast": _PRECISION,
    "data_types": _PRECISION,
    "communication_data_type": f"gradients are reduced in fp32; {_PRECISION}",
    "seq_parallel_communication_data_type": _PARALLEL,
    "prescale_gradients": _AVERAGE,
    "gradient_predivide_factor": _AVERAGE,
    "gradient_allreduce_op": _AVERAGE,
    "sparse_gradients": _GONE,
    "disable_allgather": "DeepSpeed reads it and does nothing; leave it out",
    "activation_checkpointing": "set engine.recompute instead",
    "compile": "set engine.compile instead",
    "checkpoint": _FILES,
    "datastates_ckpt": _FILES,
    "nebula": _FILES,
    "aio": "it serves offload to NVMe, which is not supported; leave it out",
    "data_efficiency": _DATA,
    "curriculum_learning": _DATA,
    "dataloader_drop_last": _DATA,
    "progressive_layer_drop": "set student.drop_path instead",
    "elasticity": "a checkpoint loads on any number of ranks as it is; leave it out",
    "autotuning": "it restarts runs with batch sizes of its own; set batch and engine.accumulate instead",
    "hybrid_engine": "it is for generating text; leave it out",
    "pipeline": _PARALLEL,
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "use_data_before_expert_parallelism": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "weight_quantization": f"weights stay whole; {_PRECISION}",
    "compression_training": _GONE,
    "quantize_training": _GONE,
    "eigenvalue": _GONE,
    "sparse_attention": _GONE,
    "graph_harvesting": _GONE,
    "vocabulary_size": "there is no vocabulary here; leave it out",
    "zero_optimization.stage": "set engine.zero instead",
    "zero_optimization.compute_grad_norm": "Gristmill turns it off wherever DeepSpeed allows it; leave it out",
    "zero_optimization.offload_param": _LAYOUT,
    "zero_optimization.offload_optimizer": _LAYOUT,
    "zero_optimization.cpu_offload": _LAYOUT,
    "zero_optimization.cpu_offload_param": _LAYOUT,
    "zero_optimization.cpu_offload_use_pin_memory": _LAYOUT,
    "zero_optimization.zenflow": _LAYOUT,
    "zero_optimization.round_robin_gradients": _LAYOUT,
    "zero_optimization.parameter_alignment": _LAYOUT,
    "zero_optimization.legacy_stage1": _LAYOUT,
    "zero_optimization.zero_hpz_partition_size": _LAYOUT,
    "zero_optimization.zero_quantized_weights": _LAYOUT,
    "zero_optimization.zero_quantized_nontrainable_weights": _LAYOUT,
    "zero_optimization.zero_quantized_gradients": _LAYOUT,
    "zero_optimization.zeropp_loco_param": _LAYOUT,
    "zero_optimization.mics_shard_size": _LAYOUT,
    "zero_optimization.mics_hierarchical_params_gather": _LAYOUT,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "set optimizer.name and the fields beside it instead",
    "zero_optimization.load_from_fp32_weights": _FILES,
    "zero_optimization.elastic_checkpoint": _FILES,
    "zero_optimization.pipeline_loading_checkpoint": _FILES,
    "zero_optimization.gather_16bit_weights_on_model_save": _FILES,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _FILES,
}


class DeepSpeedConfigError(GristmillError):
    """A key or value of `engine.deepspeed` that DeepSpeed does not know or the engine cannot allow."""


def deepspeed_config(
    own: dict[str, Any],
    *,
    stage: int,
    precision: Literal["fp32", "autocast", "bf16"],
    micro_batch: int,
    accumulate: int,
    world: int,
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`: the user's `own` (engine.deepspeed, left as it is) and what is ours.

    micro_batch: images a rank and backward; accumulate: backwards a step; world: ranks. Autocast is not DeepSpeed's
    here (its own lowers what the reduction carries), so that fp32 and autocast read alike. With bf16, gradients are
    kept and reduced in fp32 under ZeRO; without ZeRO, DeepSpeed accepts no other kind than the weights' own, and
    micro-batches add up in bf16.
    Raises DeepSpeedConfigError naming the key and what to set instead, or the nearest key for an unknown one.
    """
    if own:
        _check(own)
    bf16 = precision == "bf16"
    config = copy.deepcopy(own)
    config.setdefault("zero_optimization", {})["stage"] = stage
    if stage == 2 or (stage == 1 and not bf16):  # elsewhere DeepSpeed insists on its norm
        config["zero_optimization"]["compute_grad_norm"] = False
    config |= {
        "train_batch_size": micro_batch * accumulate * world,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1: the norm of all gradients together, unasked
        "zero_allow_untested_optimizer": True,  # ours are torch's, but only exact types count as tested
        "steps_per_print": 2**31,
    }
    # It makes a GPU's host wait twice a step; the run's own clock does not.
    config.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    if bf16:
        # The verdict decides on bad steps, before DeepSpeed sees them.
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
        config["communication_data_type"] = "fp32"
        config["data_types"] = {"grad_accum_dtype": "fp32" if stage else "bf16"}
    return config


def _check(own: dict[str, Any]) -> None:
    """Raise DeepSpeedConfigError unless every key of the user's is free and every value is of its kind."""
    deepspeed = quiet_deepspeed()
    _names(own, "", FREE)
    for key in SWITCHES:
        if not isinstance(own.get(key, False), bool):
            raise DeepSpeedConfigError(f"{WHERE}.{key}: {own[key]!r} is neither true nor false")
    levels = deepspeed.utils.logging.log_levels
    if "log_level" in own and own["log_level"] not in list(levels):
        raise DeepSpeedConfigError(f"{WHERE}.log_level: {own['log_level']!r} is none of {', '.join(levels)}")
    sections = {key: own[key] for key in own if key not in (*SWITCHES, "log_level")}
    for key, section in sections.items():
        if not isinstance(section, dict):
            raise DeepSpeedConfigError(f"{WHERE}.{key}: {section!r} is no mapping of keys to values")
    _section(sections, "zero_optimization", deepspeed.runtime.zero.config.DeepSpeedZeroConfig, FREE_ZERO)
    _section(sections, "comms_logger", deepspeed.comm.config.CommsLoggerConfig)
    for key in MONITORS:
        model = deepspeed.monitor.config.DeepSpeedMonitorConfig.model_fields[key].annotation
        _section(sections, key, model)
    _names(sections.get("flops_profiler", {}), "flops_profiler.", set(FLOPS))
    timers = sections.get("timers", {})
    _names(timers, "timers.", {"throughput"})
    if not isinstance(timers.get("throughput", {}), dict):
        raise DeepSpeedConfigError(
            f"{WHERE}.timers.throughput: {timers['throughput']!r} is no mapping of keys to values"
        )
    timer = deepspeed.utils.config.DeepSpeedThroughputTimerConfig
    _section({f"timers.{key}": value for key, value in timers.items()}, "timers.throughput", timer)


def _section(sections: dict[str, Any], key: str, model: type[BaseModel], free: set[str] | None = None) -> None:
    """Check one section against DeepSpeed's own model of it; keys may be given by name or by alias."""
    if key not in sections:
        return
    section, prefix = sections[key], f"{key}."
    aliases = {field.alias: name for name, field in model.model_fields.items() if field.alias}
    _names(section, prefix, set(model.model_fields) if free is None else free, aliases)
    try:
        model(**section)
    except TypeError as error:  # some of its validators raise it past pydantic
        raise DeepSpeedConfigError(f"{WHERE}.{key}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([key, *map(str, first["loc"])])
        raise DeepSpeedConfigError(f"{WHERE}.{where}: {first['msg']}, not {first['input']!r}") from error


def _names(given: dict[str, Any], prefix: str, free: set[str], aliases: dict[str, str] | None = None) -> None:
    """Raise for the first key that is not free: with its reason if it is refused, else with the nearest known one.

    aliases: other spellings, {as DeepSpeed documents it: as its model has it}.
    """
    aliases = aliases or {}
    for key in given:
        name = aliases.get(key, key)
        if f"{prefix}{name}" in REFUSED:
            raise DeepSpeedConfigError(f"{WHERE}.{prefix}{key}: {REFUSED[f'{prefix}{name}']}")
        if name not in free:
            documented = {name: alias for alias, name in aliases.items()}
            shown = sorted(documented.get(name, name) for name in free)
            refused = [path.removeprefix(prefix) for path in REFUSED if path.startswith(prefix)]
            hint = nearest(key, [*shown, *sorted(free), *refused]).strip() or f"free to set are {', '.join(shown)}"
            raise DeepSpeedConfigError(f"{WHERE}.{prefix}{key}: DeepSpeed has no such key; {hint}")
