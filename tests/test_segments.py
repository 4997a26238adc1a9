"""Segments on disk: whole or left out, and many small ones become few without a moment in which a text is missing."""

import contextlib
import hashlib
import multiprocessing
import zlib

import numpy as np
import pytest

from embedding_finetune.data.texts import raw_digests
from embedding_finetune.retrieval import segments as module
from embedding_finetune.retrieval.segments import (
    DamagedError,
    ForeignError,
    Segment,
    check,
    count_texts,
    file_at,
    merge_small,
    read_digests,
    read_rows,
    remove_damaged,
    write_segment,
)

TEXTS = [f"text {number}" for number in range(400)]
DIGESTS = raw_digests(TEXTS)
VECTORS = np.random.default_rng(0).standard_normal((400, 3)).astype(np.float32)


def write(folder, numbers):
    return write_segment(folder, DIGESTS[numbers], VECTORS[numbers])


def listed(folder):
    return [Segment(path, count_texts(path, 3)) for path in sorted(folder.glob("*.segment"))]


def held(folder):
    """Number of each text -> its embedding, whatever segment it is in."""
    number_of = {digest: number for number, digest in enumerate(DIGESTS.tolist())}
    return {
        number_of[digest]: tuple(row)
        for path, count in listed(folder)
        for digest, row in zip(read_digests(path, 3).tolist(), read_rows(path, np.arange(count), 3).tolist())
    }


def as_held(numbers):
    return {number: tuple(VECTORS[number].tolist()) for number in numbers}


def never(path, error):
    raise AssertionError(f"{path} was left out")


def test_a_segment_has_the_bytes_that_its_format_says(tmp_path):
    path = write(tmp_path, [4, 9])
    content = path.read_bytes()
    assert len(content) == 4 + 16 + 8 + 8 + 2 * 16 + 2 * 3 * 4
    assert content[:4] == zlib.crc32(content[4:]).to_bytes(4, "little")
    assert content[4:20] == hashlib.blake2b(tmp_path.name.encode(), digest_size=16).digest()
    assert content[20:36] == (2).to_bytes(8, "little") + (3).to_bytes(8, "little")
    assert content[36:52] == hashlib.blake2b(b"text 4", digest_size=16).digest()
    assert content[68:] == VECTORS[[4, 9]].tobytes()
    assert path.name == hashlib.blake2b(content[36:68], digest_size=16).hexdigest() + ".segment"
    assert read_rows(path, np.array([1, 0, 1]), 3).tolist() == VECTORS[[9, 4, 9]].tolist()


def test_a_segment_of_another_folder_is_known_by_its_header_whatever_its_size(tmp_path):
    path, other = write(tmp_path, [4, 9]), tmp_path / "other"
    other.mkdir()
    path = path.rename(other / path.name)
    for width in (3, 5):
        for read in (count_texts, read_digests):
            with pytest.raises(ForeignError):
                read(path, width)


@pytest.mark.parametrize("end", [0, 10, 35, 90])
def test_a_segment_that_is_cut_short_anywhere_is_damaged(tmp_path, end):
    path = write(tmp_path, [4, 9])
    path.write_bytes(path.read_bytes()[:end])
    for read in (lambda: count_texts(path, 3), lambda: read_digests(path, 3), lambda: read_rows(path, np.arange(2), 3)):
        with pytest.raises(DamagedError) as damaged:
            read()
        assert damaged.value.file == file_at(path)
    with pytest.raises(DamagedError):
        check(path)


def test_only_the_file_that_was_found_damaged_is_removed(tmp_path):
    path = write(tmp_path, [4, 9])
    damaged = file_at(path)
    write(tmp_path, [4, 9])
    remove_damaged(path, damaged)
    assert held(tmp_path) == as_held([4, 9])
    remove_damaged(path, file_at(path))
    assert not path.exists()
    remove_damaged(path, file_at(path))


def test_a_flipped_bit_anywhere_fails_the_check(tmp_path):
    path = write(tmp_path, [4, 9])
    content = path.read_bytes()
    check(path)
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        with pytest.raises(DamagedError):
            check(path)


def test_small_segments_become_full_ones_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TEXTS_PER_SEGMENT", 10)
    monkeypatch.setattr(module, "SMALL", 5)
    large = write(tmp_path, [30, 31, 32, 33, 34])
    for first in range(0, 30, 3):
        write(tmp_path, [first, first + 1, first + 2])
    merge_small(listed(tmp_path), 3, never)
    # Three of 3 texts fit into 10: 3 groups of 3 segments, and one segment that is alone.
    assert sorted(segment.texts for segment in listed(tmp_path)) == [3, 5, 9, 9, 9]
    assert large.exists()
    assert held(tmp_path) == as_held(range(35))


def test_a_text_that_several_segments_hold_is_merged_once(tmp_path):
    write(tmp_path, [1, 2, 3])
    write(tmp_path, [3, 2, 5])
    write(tmp_path, [5])
    merge_small(listed(tmp_path), 3, never)
    assert [segment.texts for segment in listed(tmp_path)] == [4]
    assert held(tmp_path) == as_held([1, 2, 3, 5])


def test_a_merged_segment_that_has_the_name_of_a_source_stays(tmp_path):
    whole = write(tmp_path, sorted(range(6), key=lambda number: DIGESTS[number]))  # as merging sorts them
    write(tmp_path, [5, 0])
    write(tmp_path, [2])
    merge_small(listed(tmp_path), 3, never)
    assert [segment.path for segment in listed(tmp_path)] == [whole]
    assert held(tmp_path) == as_held(range(6))


def test_the_same_texts_in_another_order_are_one_file_whoever_merges_them(tmp_path):
    """Else each of two processes could remove the other's."""
    names = []
    for folder, numbers in ((tmp_path / "one", [1, 2, 3]), (tmp_path / "other", [3, 1, 2])):
        folder.mkdir()
        for number in numbers:
            write(folder, [number])
        merge_small([Segment(write(folder, [number]), 1) for number in numbers], 3, never)
        names.append([segment.path.name for segment in listed(folder)])
    assert names[0] == names[1]


def test_a_damaged_source_is_told_and_left_where_it_is(tmp_path):
    damaged = write(tmp_path, [7, 8])
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for number in range(4):
        write(tmp_path, [number])
    told = []
    merge_small(listed(tmp_path), 3, lambda path, error: told.append((path, type(error))))
    assert told == [(damaged, DamagedError)]
    damaged.unlink()
    assert held(tmp_path) == as_held(range(4))


def test_where_another_process_merges_meanwhile_nothing_is_lost(tmp_path):
    for number in range(6):
        write(tmp_path, [number])
    stale = listed(tmp_path)
    merge_small(listed(tmp_path), 3, never)
    with pytest.raises(FileNotFoundError):
        merge_small(stale, 3, never)
    assert held(tmp_path) == as_held(range(6))


def test_on_a_full_disk_all_stays_as_it_is(tmp_path, monkeypatch):
    for number in range(6):
        write(tmp_path, [number])
    before = listed(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Exception, match="No space left"):
        merge_small(before, 3, never)
    assert listed(tmp_path) == before


def write_and_merge(folder, own):
    for first in range(own.start, own.stop, 2):
        write(folder, [first, first + 1])
        write(folder, [first, *range(first % 7)])  # what others write too
        with contextlib.suppress(FileNotFoundError):
            merge_small([Segment(path, 2) for path in folder.glob("*.segment")], 3, never)


def test_processes_that_write_and_merge_at_once_lose_no_text(tmp_path):
    """Each text but the first 7 is written by one process only."""
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(write_and_merge, [(tmp_path, range(first, first + 100)) for first in range(0, 400, 100)])
    assert held(tmp_path) == as_held(range(400))
