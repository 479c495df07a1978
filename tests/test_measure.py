"""Measuring: challenges, verdicts, records, and what the planner makes of them."""

import base64
import json
from dataclasses import replace

import numpy as np
import pytest

from qipan.catalogue import load_catalogue
from qipan.catalogue.families import STANDARD, standard_hours
from qipan.catalogue.measured import records, with_measured
from qipan.errors import InvalidInput
from qipan.hardware import ChipClassId
from qipan.measure import Challenge, Claim, Measurement, check, judge, read_record, write_record
from qipan.measure.challenge import rows_of, weights
from qipan.measure.record import own_key, public_hex
from qipan.measure.session import examine

BASE = Measurement(
    "newco/x1", "cpu", 2, "node1", 1000.0, 1000.0 + 86400, {"fp32": {512: 1e9, 1024: 2e9}, "bf16": {1024: 8e12}}, 5e9, 2**20
)  # fmt: skip


def answer(challenge: Challenge, b):
    return rows_of(challenge, b, np.arange(challenge.size))[0].astype(np.float32)


def test_a_right_answer_passes_and_a_wrong_row_does_not():
    challenge = Challenge(64, 5, "fp32", 1, 2)
    b = weights(challenge)
    right = answer(challenge, b)
    assert check(challenge, b, right, np.random.default_rng(0)) == ""
    assert "off by" in check(challenge, b, np.zeros_like(right), np.random.default_rng(0))
    other = answer(replace(challenge, start=3), b)
    assert "off by" in check(challenge, b, other, np.random.default_rng(0))
    assert "shape" in check(challenge, b, right[:3], np.random.default_rng(0))


def test_a_coarser_precision_than_claimed_shows():
    challenge = Challenge(64, 5, "fp32", 1, 2)
    b = weights(challenge)
    coarse = answer(challenge, b.astype(np.float16).astype(np.float32))
    assert "off by" in check(challenge, b, coarse, np.random.default_rng(0))
    assert check(replace(challenge, precision="bf16"), b, coarse, np.random.default_rng(0)) == ""


def test_half_of_the_rows_is_not_enough():
    challenge = Challenge(64, 4, "fp32", 5, 6)
    b = weights(challenge)
    half = answer(challenge, b)
    half[:, ::2] = 0.0
    assert all(check(challenge, b, half, np.random.default_rng(seed)) for seed in range(50))


def test_verdicts():
    honest = judge(Claim(2, 100.0), [101, 99], [[98, 103], [97, 105]])
    assert honest.holds
    assert honest.real_devices == pytest.approx(2, rel=0.05)
    shared = judge(Claim(2), [100, 100], [[50, 51], [50, 49]])
    assert shared.reasons == ("2 devices declared, together they do what 1.0 do alone",)
    slow = judge(Claim(1, 200.0), [100], [[100, 101]])
    assert "200 FLOP/s a device declared, 100 measured" in slow.reasons[0]
    one = judge(Claim(2, 100.0), [100, 100], [[100, 100], [60, 60]])
    assert any("slow: device 1" in reason for reason in one.reasons)
    assert not judge(Claim(2, 0.0), [], [[1.0]]).holds
    assert not judge(Claim(1), [1.0], [[1.0]], ["device 0: products are off"]).holds


class Paced:
    """A device whose rounds take as many seconds as `pace` says of their number, by a clock of its own."""

    def __init__(self, pace):
        self.pace, self.now_s, self.rounds = pace, 0.0, 0

    def send(self, verb, **given):
        self.answer = {}
        if verb == "prepare":
            self.prepared = Challenge(given["size"], given["steps"], given["precision"], given["weights"], 0)
        else:
            challenge = replace(self.prepared, start=given["start_seed"])
            prints = answer(challenge, weights(challenge)).astype("<f4").tobytes()
            self.answer = {"prints": base64.b64encode(prints).decode()}
            self.now_s += self.pace(self.rounds)
            self.rounds += 1

    def receive(self):
        return self.answer

    def examined(self):
        claim = Claim(1, Challenge(16, 1, "fp32", 0, 0).flops / 1.0)
        verdict, asked = examine([self], claim, 16, 1, rounds=3, most=12, clock=lambda: self.now_s)
        return verdict.holds, len(asked.together[0])


def test_a_node_near_the_border_is_asked_again_and_a_clear_one_is_not():
    assert Paced(lambda _: 1.0).examined() == (True, 3)
    assert Paced(lambda _: 2.0).examined() == (False, 3)
    assert Paced(lambda _: 1.3).examined() == (True, 12)
    assert Paced(lambda number: 1.3 if number < 4 else 3.0).examined() == (False, 6)  # its luck does not last


def test_a_record_that_was_changed_has_expired_or_is_foreign_is_refused(tmp_path):
    path = write_record(BASE, tmp_path)
    mine = frozenset({public_hex(own_key(tmp_path))})
    assert read_record(path, mine, 1000.0) == BASE
    with pytest.raises(InvalidInput, match="expired"):
        read_record(path, mine, 1000.0 + 2 * 86400)
    with pytest.raises(InvalidInput, match="not trusted"):
        read_record(path, frozenset(), 1000.0)
    changed = json.loads(path.read_text())
    changed["body"]["gemm_flops_per_s"]["fp32"]["512"] = 9e12
    path.write_text(json.dumps(changed))
    with pytest.raises(InvalidInput, match="changed after it was signed"):
        read_record(path, mine, 1000.0)
    assert records(tmp_path, 1000.0)[0] == []


def test_measured_figures_replace_nominal_ones_and_the_slowest_node_counts(tmp_path):
    chip = "nvidia/a100-sxm4-80gb"
    for host, rate in (("a", 280e12), ("b", 250e12)):
        write_record(
            replace(BASE, chip_class=chip, host=host, gemm_flops_per_s={"bf16": {4096: rate}}), tmp_path
        )
    write_record(
        replace(BASE, chip_class=chip, host="c", holds=False, gemm_flops_per_s={"bf16": {4096: 1.0}}),
        tmp_path,
    )
    found = with_measured(load_catalogue(), tmp_path, 1000.0).find(chip)
    assert found.measured_flops_per_s["bf16"].value == 250e12
    assert found.measured_flops_per_s["bf16"].confidence == "measured"
    assert found.peak_flops_per_s["bf16"].value == 312e12


def test_a_device_is_worth_something_else_for_each_kind_of_work():
    catalogue = load_catalogue()
    standard = catalogue.chips[ChipClassId(STANDARD)]
    assert standard_hours(standard, standard)["decode"] == pytest.approx(1.0)
    h20 = standard_hours(catalogue.find("NVIDIA H20"), standard)
    assert h20["decode"] > 1.5 > 0.7 > h20["dense train"]  # much bandwidth, little compute
    assert h20["fp64"] is None  # no published figure is no figure
