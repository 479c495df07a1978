"""Text, image, audio and video from several sources: one order for any number of ranks, read ahead, broken samples."""

import numpy as np
import pytest

from make_shards import make
from qipan.errors import InvalidInput
from qipan.trainer.data import read_texts
from qipan.trainer.shards import Reader, _Ahead, place, read_source, write_index


@pytest.fixture
def sources(tmp_path):
    make(tmp_path / "one", "a", 7)
    make(tmp_path / "one", "b", 5, first=7)
    make(tmp_path / "two", "c", 9, first=100)
    return [tmp_path / "one", tmp_path / "two"]


def keys(reader: Reader, positions) -> list[str]:
    return [row["key"] for row in reader.rows(list(positions))]


def test_a_sample_has_all_four_kinds(sources):
    row = next(iter(Reader.of(sources).rows([3])))
    number = int(row["text"].split()[1])
    assert row["image"].shape == (4, 6, 3)
    assert row["image"][0, 0].tolist() == [number, 10, 20]
    assert row["audio"].shape == (16, 1)
    assert row["audio"][0, 0] == pytest.approx(number / 32768)
    assert row["video"].shape == (3, 6, 8)
    assert (row["video"] == number).all()


def test_the_order_is_a_function_of_seed_epoch_and_position(sources):
    """Four ranks that take every fourth position see together what one sees; each epoch holds every sample once."""
    whole = keys(Reader.of(sources, seed=5), range(42))
    ranks = [keys(Reader.of(sources, seed=5), range(rank, 42, 4)) for rank in range(4)]
    assert [ranks[i % 4][i // 4] for i in range(42)] == whole
    assert len(set(whole[:21])) == len(set(whole[21:])) == 21
    assert whole[:21] != whole[21:]
    assert keys(Reader.of(sources, seed=6), range(21)) != whole[:21]


@pytest.mark.parametrize("count", [1, 2, 3, 17, 1000])
def test_a_place_is_a_permutation(count):
    assert sorted(place(count, 1, 2, i) for i in range(count)) == list(range(count))


def test_reading_ahead_stops_at_its_bytes_and_a_large_sample_still_passes(sources):
    samples = [sample for source in sources for sample in read_source(source)]
    size = samples[0].size
    ahead = _Ahead(samples, 3 * size + 10)
    for number in range(len(samples)):
        ahead.take(number)
    assert ahead.most_bytes <= 3 * size + 10
    small = _Ahead(samples, 1)
    assert all(isinstance(small.take(number), dict) for number in range(len(samples)))


def test_broken_samples_are_replaced_alike_until_the_budget_is_spent(tmp_path):
    make(tmp_path / "s", "a", 20, broken=(4, 11))
    reader = Reader.of([tmp_path / "s"], seed=1)
    found = keys(reader, range(20))
    assert len(found) == 20
    assert not {"a-000004", "a-000011"} & set(found)
    assert len(reader.bad) == 2
    assert keys(Reader.of([tmp_path / "s"], seed=1), range(10, 20)) == found[10:]
    make(tmp_path / "t", "a", 20, broken=tuple(range(8)))
    with pytest.raises(InvalidInput, match=r"4 of \d+ samples are broken, 1.0% are allowed"):
        keys(Reader.of([tmp_path / "t"], seed=1), range(20))


def test_an_index_of_another_tar_is_refused(tmp_path):
    tar = make(tmp_path / "s", "a", 3)
    write_index(tar)
    make(tmp_path / "s", "a", 9)
    with pytest.raises(InvalidInput, match=r"is of another a\.tar"):
        read_source(tmp_path / "s")


def test_luma_and_sound_keep_their_values(sources):
    rows = list(Reader.of(sources).rows(range(21)))
    assert {row["video"].dtype for row in rows} == {np.dtype("uint8")}
    assert max(float(np.abs(row["audio"]).max()) for row in rows) < 0.01


def test_the_built_in_trainer_reads_the_text_of_shards(sources):
    texts = read_texts(f"shards:{sources[1]}")
    assert sorted(texts) == [f"sample {number}" for number in range(100, 109)]
