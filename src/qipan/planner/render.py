"""A strategy as launch arguments of other trainers.  What a target cannot say is refused, never left out.

Which of these a target's own parser has accepted is told in docs/render.md."""

import json
from collections.abc import Callable

import yaml

from qipan.errors import InvalidInput
from qipan.strategy import SiteStrategy, Stage, Strategy
from qipan.workload.model import Model

PRECISIONS = {"fp32": "", "bf16": "--bf16", "fp16": "--fp16", "fp8": "--bf16"}


def render(target: str, model: Model, strategy: Strategy) -> str:
    """Text for a person to paste: arguments, or a configuration file.  Raises InvalidInput for an unknown target or a
    strategy that the target has no words for."""
    if target not in TARGETS:
        raise InvalidInput(f"no renderer {target[:40]!r}; give one of {', '.join(TARGETS)}")
    if model.towers and target != "qipan":
        names = ", ".join(one.name for one in model.towers)
        raise InvalidInput(f"{model.name} has towers ({names}): {target}'s words for them are not rendered")
    return TARGETS[target](model, strategy)


def _built_in(_model: Model, strategy: Strategy) -> str:
    return f"QIPAN_STRATEGY='{strategy.to_json()}'"


def _megatron(model: Model, strategy: Strategy) -> str:
    return " \\\n  ".join(_megatron_arguments(model, strategy))


def _mindspeed(model: Model, strategy: Strategy) -> str:
    """MindSpeed patches Megatron-LM and takes its arguments."""
    return " \\\n  ".join([*_megatron_arguments(model, strategy), "--use-flash-attn", "--use-fused-rmsnorm"])


def _megatron_arguments(model: Model, strategy: Strategy) -> list[str]:
    site, stage = _even("Megatron-LM", strategy)
    if model.mla is not None:
        raise InvalidInput(
            f"{model.name}: latent attention is not rendered for Megatron-LM yet; write its ranks by hand"
        )
    pipeline, chunks = len(site.stages), len(stage.layers)
    if site.schedule not in ("none", "1f1b", "interleaved_1f1b"):
        raise InvalidInput(f"Megatron-LM has no schedule {site.schedule}; choose 1f1b or interleaved_1f1b")
    if model.layers % (pipeline * chunks):
        raise InvalidInput(
            f"Megatron-LM splits {model.layers} layers evenly only, not over {pipeline} stages of {chunks} chunks"
        )
    if site.zero == 3 and pipeline > 1:
        raise InvalidInput("Megatron-LM cannot shard parameters under a pipeline (zero 3); choose zero 1")
    found = [
        f"--num-layers {model.layers}", f"--hidden-size {model.hidden}", f"--ffn-hidden-size {model.ffn_hidden}",
        f"--num-attention-heads {model.heads}", f"--kv-channels {model.head_dim}", f"--seq-length {strategy.seq}",
        f"--max-position-embeddings {max(strategy.seq, model.max_seq)}",
        f"--micro-batch-size {_micro(site, stage)}", f"--global-batch-size {strategy.global_batch_rows}",
        f"--tensor-model-parallel-size {stage.tp}", f"--pipeline-model-parallel-size {pipeline}",
        f"--context-parallel-size {stage.cp}", f"--seed {strategy.seed}",
    ]  # fmt: skip
    if model.kv_heads != model.heads:
        found += ["--group-query-attention", f"--num-query-groups {model.kv_heads}"]
    if model.gated_mlp:
        found.append("--swiglu")
    if not model.biases:
        found.append("--disable-bias-linear")
    if not model.norm_biases:
        found.append("--normalization RMSNorm")
    if not model.learned_positions:
        found.append("--position-embedding-type rope")
    if not model.tied_embeddings:
        found.append("--untie-embeddings-and-output-weights")
    if model.moe is not None:
        found += [
            f"--num-experts {model.moe.experts}", f"--moe-router-topk {model.moe.experts_per_token}",
            f"--moe-ffn-hidden-size {model.moe.expert_ffn_hidden}", f"--expert-model-parallel-size {stage.ep}",
        ]  # fmt: skip
    if stage.sp:
        found.append("--sequence-parallel")
    if chunks > 1:
        found.append(f"--num-layers-per-virtual-pipeline-stage {model.layers // (pipeline * chunks)}")
    if site.zero == 3:
        found.append("--use-torch-fsdp2")
    elif site.zero:
        found.append("--use-distributed-optimizer")
    if site.recompute == "full":
        found.append("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    elif site.recompute == "selective":
        found.append("--recompute-granularity selective")
    if site.offload:
        found.append("--optimizer-cpu-offload")
    found.append(PRECISIONS[site.precision])
    if site.precision == "fp8":
        found.append("--fp8-format hybrid")
    return [argument for argument in found if argument]


TITAN_SCHEDULES = {
    "none": "1F1B", "gpipe": "GPipe", "1f1b": "1F1B", "interleaved_1f1b": "Interleaved1F1B",
    "interleaved_zero_bubble": "InterleavedZeroBubble", "zbv": "ZBVZeroBubble", "dualpipev": "DualPipeV",
}  # fmt: skip


def _torchtitan(_model: Model, strategy: Strategy) -> str:
    """Replicas where nothing or the optimiser alone is sharded; else shards over all ranks."""
    site, stage = _even("torchtitan", strategy)
    shard = stage.dp // site.replicas if site.zero >= 2 else 1
    piped = (
        len(site.stages) > 1
    )  # a pipeline splits a rank's rows itself; else each accumulation takes a micro-batch
    found = [
        f"--parallelism.data_parallel_replicate_degree={stage.dp // shard}",
        f"--parallelism.data_parallel_shard_degree={shard}",
        f"--parallelism.tensor_parallel_degree={stage.tp}",
        f"--parallelism.context_parallel_degree={stage.cp}",
        f"--parallelism.expert_parallel_degree={stage.ep}",
        f"--parallelism.pipeline_parallel_degree={len(site.stages)}",
        f"--training.local_batch_size={stage.rows_per_dp[0] if piped else _micro(site, stage)}",
        f"--training.global_batch_size={strategy.global_batch_rows}",
        f"--training.seq_len={strategy.seq}",
    ]
    if piped:
        found += [
            f"--parallelism.pipeline_parallel_schedule={TITAN_SCHEDULES[site.schedule]}",
            f"--parallelism.pipeline_parallel_microbatch_size={_micro(site, stage)}",
            "--training.disable_cuda_graphs",  # they know no pipeline
        ]
    return " \\\n  ".join([*found, f"activation-checkpoint:{site.recompute}"])  # a subcommand stands last


def _deepspeed(_model: Model, strategy: Strategy) -> str:
    """A `ds_config.json`; tensor and pipeline parallelism are the script's own."""
    site, stage = _even("DeepSpeed", strategy)
    if stage.tp > 1 or len(site.stages) > 1 or stage.cp > 1:
        raise InvalidInput(
            "a DeepSpeed configuration says ZeRO alone; choose a strategy without tp, pp and cp"
        )
    micro = _micro(site, stage)
    zero: dict[str, object] = {"stage": site.zero}
    if site.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return json.dumps(
        {
            "train_batch_size": strategy.global_batch_rows, "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": strategy.global_batch_rows // (micro * stage.dp),
            "zero_optimization": zero, "bf16": {"enabled": site.precision == "bf16"},
            "fp16": {"enabled": site.precision == "fp16"},
        },
        indent=1,
    )  # fmt: skip


ACCELERATE_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16", "fp8": "fp8"}


def _accelerate(_model: Model, strategy: Strategy) -> str:
    """A configuration file for `accelerate launch --config_file`: FSDP2, replicas of it, tensor and context parallel.  The batch
    and its accumulation are the script's own, so they stand in a comment."""
    site, stage = _even("Accelerate", strategy)
    if len(site.stages) > 1 or stage.ep > 1:
        raise InvalidInput(
            "an Accelerate configuration has no pipeline and no experts; choose another option"
        )
    if site.zero == 1:
        raise InvalidInput(
            "Accelerate's FSDP2 shards gradients with the optimiser (zero 2) or nothing; choose zero 2 or 3"
        )
    if not site.zero and site.recompute == "full":
        raise InvalidInput("without shards Accelerate has no word for recompute; say it in the script")
    if site.recompute == "selective":
        raise InvalidInput("Accelerate recomputes whole layers or nothing; choose recompute none or full")
    shards = stage.dp // site.replicas if site.zero else 1
    micro = _micro(site, stage)
    sharded = site.zero or stage.tp > 1 or stage.cp > 1
    found: dict[str, object] = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP" if sharded else "MULTI_GPU",
        "num_processes": strategy.devices, "mixed_precision": ACCELERATE_PRECISIONS[site.precision],
    }  # fmt: skip
    if sharded:
        found["fsdp_config"] = {
            "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": site.zero == 3, "fsdp_activation_checkpointing": site.recompute == "full",
            "fsdp_offload_params": site.offload, "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        }  # fmt: skip
        found["parallelism_config"] = {
            "parallelism_config_dp_replicate_size": stage.dp // shards, "parallelism_config_dp_shard_size": shards,
            "parallelism_config_tp_size": stage.tp, "parallelism_config_cp_size": stage.cp,
        }  # fmt: skip
    steps = stage.rows_per_dp[0] // micro
    note = f"# in the script: {micro} sequences a process, gradient_accumulation_steps={steps}, seed {strategy.seed}\n"
    return note + yaml.safe_dump(found, sort_keys=False).rstrip()


def _even(target: str, strategy: Strategy) -> tuple[SiteStrategy, Stage]:
    """The one site and its first stage, when every stage and rank is alike."""
    if len(strategy.sites) > 1:
        raise InvalidInput(f"{target} trains at one site; this strategy has {len(strategy.sites)}")
    site = strategy.sites[0]
    first = site.stages[0]
    alike = {
        (stage.chip_class, stage.tp, stage.cp, stage.ep, stage.dp, stage.rows_per_dp) for stage in site.stages
    }
    if len(alike) > 1 or len(set(first.rows_per_dp)) > 1:
        raise InvalidInput(
            f"{target} has no words for unlike stages, or for rows that {first.dp} ranks do not share evenly; choose a"
            f" global_batch of a multiple of {first.dp} rows, another option, or the built-in trainer"
        )
    if first.rows_per_dp[0] % site.micro_batches:
        raise InvalidInput(
            f"{target} wants equal micro-batches, {first.rows_per_dp[0]} rows are not {site.micro_batches} of them"
        )
    return site, first


def _micro(site: SiteStrategy, stage: Stage) -> int:
    return stage.rows_per_dp[0] // site.micro_batches


TARGETS: dict[str, Callable[[Model, Strategy], str]] = {
    "qipan": _built_in, "megatron": _megatron, "mindspeed": _mindspeed, "torchtitan": _torchtitan,
    "deepspeed": _deepspeed, "accelerate": _accelerate,
}  # fmt: skip
