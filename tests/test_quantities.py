import pytest
from hypothesis import given
from hypothesis import strategies as st

from qipan.errors import InvalidInput
from qipan.quantities import (
    format_bytes,
    format_devices,
    format_duration,
    format_money,
    parse_bytes,
    parse_bytes_per_s,
    parse_count,
    parse_duration_s,
    parse_money_micro_cny,
)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_count, "2T", 2 * 10**12),
        (parse_count, "1.5k", 1500),
        (parse_money_micro_cny, "8M CNY", 8 * 10**12),
        (parse_money_micro_cny, "0.35 CNY", 350_000),
        (parse_duration_s, "1h30m", 5400.0),
        (parse_duration_s, "500ms", 0.5),
        (parse_duration_s, "30d", 2_592_000.0),
        (parse_bytes, "80GiB", 80 * 2**30),
        (parse_bytes_per_s, "200Mbit/s", 25e6),
        (parse_bytes_per_s, "12 GB/s", 12e9),
    ],
)
def test_quantities_as_people_write_them(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    "parse", [parse_count, parse_money_micro_cny, parse_duration_s, parse_bytes, parse_bytes_per_s]
)
@pytest.mark.parametrize(
    "text", ["", "nan", "inf", "-1", "1e999", "9" * 40, "8M", "3 parsecs", "1.0000000001", "1;2"]
)
def test_nonsense_is_refused_with_the_value_and_an_example(parse, text):
    if parse is parse_count and text == "8M":
        return
    with pytest.raises(InvalidInput, match=r"write|CNY"):
        parse(text)


@given(st.integers(0, 10**15))
def test_money_prints_exactly_and_reads_back(micro):
    assert parse_money_micro_cny(format_money(micro).replace(",", "")) == micro


def test_people_read_short_forms():
    assert format_duration(88) == "88s"
    assert format_duration(7200) == "2.0h"
    assert format_bytes(3 * 2**30) == "3.0GiB"
    assert [format_devices(count) for count in (0, 1, 8)] == ["0 devices", "1 device", "8 devices"]


@given(st.integers(0, 2**53))
def test_whole_numbers_read_back_as_counts_and_bytes(number):
    assert parse_count(str(number)) == parse_bytes(f"{number}B") == number


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59))
def test_a_duration_is_the_sum_of_its_parts(hours, minutes, seconds):
    assert parse_duration_s(f"{hours}h{minutes}m{seconds}s") == hours * 3600 + minutes * 60 + seconds


@given(st.text(max_size=12))
def test_any_text_gives_a_quantity_or_a_refusal(text):
    for parse in (parse_money_micro_cny, parse_count, parse_duration_s, parse_bytes, parse_bytes_per_s):
        try:
            value = parse(text)
        except InvalidInput:
            continue
        assert value >= 0


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_count, "999999999999T"),
        (parse_bytes, "99999999PB"),
        (parse_duration_s, "999999w"),
        (parse_bytes_per_s, "999999999TB/s"),
        (parse_money_micro_cny, "999999999B CNY"),
    ],
)
def test_absurd_sizes_are_refused(parse, text):
    with pytest.raises(InvalidInput, match="write"):
        parse(text)
