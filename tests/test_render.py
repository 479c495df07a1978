"""A strategy in other trainers' words, or a refusal."""

import json
import shlex
from dataclasses import replace
from itertools import pairwise

import pytest
import yaml

from qipan.errors import InvalidInput
from qipan.planner.render import TARGETS, render
from qipan.strategy import SiteStrategy, Stage, Strategy, parse_strategy
from qipan.workload.cards import CARDS

LLAMA = CARDS["llama-3-70b"]
ROWS = (64,) * 4
STAGES = tuple(
    Stage("nvidia/h100-sxm5-80gb", ((first, first + 10), (first + 40, first + 50)), tp=8, sp=True, dp=4, rows_per_dp=ROWS)
    for first in (0, 10, 20, 30)
)  # fmt: skip
PIPED = Strategy(
    7, 8192, 256,
    (SiteStrategy("a", STAGES, 32, "interleaved_1f1b", 1, "selective", "bf16"),),
)  # fmt: skip
SHARDED = Strategy(
    7, 4096, 256,
    (SiteStrategy("a", (Stage("x/y", ((0, 80),), dp=4, rows_per_dp=ROWS),), 16, "none", 3, "full", "bf16", True),),
)  # fmt: skip


def test_the_built_in_trainers_own_parser_reads_its_own():
    text = render("qipan", LLAMA, PIPED)
    (assignment,) = shlex.split(text)
    assert parse_strategy(assignment.removeprefix("QIPAN_STRATEGY=")) == PIPED


def test_megatron_is_told_everything_that_the_strategy_says():
    words = shlex.split(render("megatron", LLAMA, PIPED).replace("\\\n", ""))
    said = dict(pairwise(words))
    assert said["--tensor-model-parallel-size"] == "8"
    assert said["--pipeline-model-parallel-size"] == "4"
    assert said["--num-layers-per-virtual-pipeline-stage"] == "10"
    assert said["--micro-batch-size"] == "2"
    assert said["--global-batch-size"] == "256"
    assert said["--recompute-granularity"] == "selective"
    assert {"--sequence-parallel", "--use-distributed-optimizer", "--swiglu", "--bf16"} <= set(words)


def test_deepspeed_batches_multiply():
    found = json.loads(render("deepspeed", LLAMA, SHARDED))
    each = found["train_micro_batch_size_per_gpu"] * found["gradient_accumulation_steps"]
    assert each * 4 == found["train_batch_size"] == 256
    assert found["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    }


def test_torchtitan_degrees_multiply_to_the_devices():
    *lines, last = render("torchtitan", LLAMA, PIPED).splitlines()
    assert last.strip() == "activation-checkpoint:selective"
    found = dict(line.strip(" \\").split("=") for line in lines if "=" in line)
    degrees = [int(value) for key, value in found.items() if key.endswith("degree") and "expert" not in key]
    product = 1
    for degree in degrees:
        product *= degree
    assert product == PIPED.devices


def test_accelerate_is_given_shards_that_multiply_to_its_processes():
    found = yaml.safe_load(render("accelerate", LLAMA, SHARDED))
    sizes = found["parallelism_config"]
    assert found["num_processes"] == 4
    assert sizes["parallelism_config_dp_shard_size"] * sizes["parallelism_config_dp_replicate_size"] == 4
    assert found["fsdp_config"]["fsdp_reshard_after_forward"] is True
    assert found["mixed_precision"] == "bf16"
    assert "gradient_accumulation_steps=16" in render("accelerate", LLAMA, SHARDED)
    with pytest.raises(InvalidInput, match="no pipeline"):
        render("accelerate", LLAMA, PIPED)
    with pytest.raises(InvalidInput, match="whole layers"):
        render(
            "accelerate", LLAMA, replace(SHARDED, sites=(replace(SHARDED.sites[0], recompute="selective"),))
        )


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "qipan"])
def test_unlike_stages_are_refused_by_name(target):
    unlike = (replace(STAGES[0], chip_class="huawei/ascend-910b2"), *STAGES[1:])
    mixed = replace(PIPED, sites=(replace(PIPED.sites[0], stages=unlike),))
    with pytest.raises(InvalidInput, match="unlike stages"):
        render(target, LLAMA, mixed)


def test_what_a_target_cannot_say_is_refused():
    with pytest.raises(InvalidInput, match="ZeRO alone"):
        render("deepspeed", LLAMA, PIPED)
    bubble = replace(PIPED, sites=(replace(PIPED.sites[0], schedule="interleaved_zero_bubble"),))
    with pytest.raises(InvalidInput, match="no schedule"):
        render("megatron", LLAMA, bubble)
    with pytest.raises(InvalidInput, match="no renderer"):
        render("jax", LLAMA, PIPED)
