import pytest

from qipan.catalogue import load_catalogue
from qipan.errors import InvalidInput, NotFound

UNSEEN = """\
accelerators:
  - vendor: newco
    model: X1
    device_names: ["NewCo X1"]
    peak_tflops: {fp32: 40, bf16: 320}
    memory_gib: 64
    memory_bandwidth_gbs: 1600
    cards_per_node: 8
    source: "the vendor's sheet"
    confidence: datasheet
"""


def test_every_chip_that_ships_has_memory_and_a_confidence():
    catalogue = load_catalogue()
    assert len(catalogue.chips) == 73
    assert len({chip.vendor for chip in catalogue.chips.values()}) >= 15
    for chip in catalogue.chips.values():
        assert chip.memory_bytes.value > 0, chip.chip_class
        assert chip.memory_bytes.confidence in ("datasheet", "third-party", "estimate")


def test_a_card_that_shows_two_devices_is_divided():
    chip = load_catalogue().find("amd/mi250x")
    assert chip.devices_per_card == 2
    assert chip.memory_bytes.value == 64 * 2**30
    assert chip.peak_flops_per_s["bf16"].value == pytest.approx(191.5e12)
    assert chip.devices_per_node == 8


def test_a_tools_own_name_finds_the_chip():
    assert load_catalogue().find("NVIDIA A100-SXM4-40GB").chip_class == "nvidia/a100-sxm4-40gb"


def test_a_site_adds_an_unseen_model_in_ten_lines(tmp_path):
    path = tmp_path / "more.yaml"
    path.write_text(UNSEEN)
    assert load_catalogue(path).find("NewCo X1").peak_flops_per_s["bf16"].value == 320e12


def test_what_ships_is_read_once_and_a_sites_own_stay_its_own(tmp_path):
    path = tmp_path / "more.yaml"
    path.write_text(UNSEEN + "stacks: {nvidia: {image: ours}}\n")
    other = load_catalogue(path)
    once, again = load_catalogue(), load_catalogue()
    assert all(again.chips[name] is chip for name, chip in once.chips.items()), "every submission asks for it"
    assert "newco/x1" in other.chips
    assert "newco/x1" not in again.chips
    assert (other.stacks["nvidia"].image, again.stacks["nvidia"].image) == ("ours", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("memory_gib: 64", "memory_gib: -1"), "above zero"),
        (("memory_gib: 64", "memory_gib: lots"), "above zero"),
        (('    source: "the vendor\'s sheet"\n', ""), "has no source"),
        (("confidence: datasheet", "confidence: sure"), "give one of measured"),
        (("accelerators:", "chips:"), "needs a list"),
    ],
)
def test_a_broken_overlay_is_refused(tmp_path, change, message):
    path = tmp_path / "more.yaml"
    path.write_text(UNSEEN.replace(*change))
    with pytest.raises(InvalidInput, match=message):
        load_catalogue(path)


def test_a_name_that_fits_several_says_which():
    with pytest.raises(NotFound, match="h100"):
        load_catalogue().find("h100")
