"""A task's process sees the devices of its lease by its vendor's own variables."""

import pytest

from qipan.engines.visible import visible
from qipan.hardware import BoardId, ChipClassId, Pool, PoolId


def pool(chip: str, cpu_share: float = 0.0) -> Pool:
    return Pool(PoolId("p"), BoardId("dc"), ChipClassId(chip), 8, 8, 1, cpu_share=cpu_share)


@pytest.mark.parametrize(
    ("chip", "given", "seen"),
    [
        ("nvidia/h100-sxm5-80gb", [], {"CUDA_VISIBLE_DEVICES": "0,3"}),
        ("nvidia/h100-sxm5-80gb", ["CUDA_VISIBLE_DEVICES"], {}),
        (
            "huawei/ascend-910b2",
            ["CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS"],
            {"ASCEND_RT_VISIBLE_DEVICES": "0,3"},
        ),
        ("amd/mi300x", ["ROCR_VISIBLE_DEVICES"], {}),
        ("sim/a", [], {}),
    ],
)
def test_the_vendors_variable_is_set_unless_the_queue_set_it(chip, given, seen):
    assert visible(pool(chip), "0,3", given) == seen


def test_simulated_chips_and_unknown_numbers_set_nothing():
    assert visible(pool("nvidia/h100-sxm5-80gb", cpu_share=0.5), "0") == {}
    assert visible(pool("nvidia/h100-sxm5-80gb"), "") == {}
