"""What makes two texts one, in four forms; texts on disk."""

import hashlib
import io
import os
import re
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_finetune.command_line import UserError
from embedding_finetune.data import texts as texts_module
from embedding_finetune.data.texts import TextsOnDisk, canonical, folded, folded_id, raw_digests, text_digest, text_id


def test_texts_compare_after_nfc_and_stripping():
    assert canonical(" cafe\u0301\n") == "caf\u00e9"
    assert text_id("caf\u00e9") == text_id(" cafe\u0301 ")
    assert text_id("Cafe") != text_id("cafe")
    assert 0 <= text_id("x") < 2**63


@given(texts=st.lists(st.text(alphabet="a\u00e9\n\U0001f600", max_size=5)), data=st.data())
def test_texts_on_disk_are_a_list(texts, data):
    on_disk = TextsOnDisk(texts)
    part = data.draw(st.slices(len(texts)))
    assert on_disk[part] == texts[part]
    assert list(on_disk) == texts
    rows = np.array(data.draw(st.lists(st.sampled_from(range(len(texts))))) if texts else [], dtype=np.int64)
    on_disk.keep(rows)
    assert on_disk[:] == [texts[row] for row in rows]


def test_identities_are_blake2b_of_the_canonical_text_and_of_the_raw_one_for_embeddings():
    spelled, plain = " cafe\u0301\n", "caf\u00e9"
    assert text_digest(spelled) == text_digest(plain) == hashlib.blake2b(plain.encode(), digest_size=16).digest()
    eight = hashlib.blake2b(plain.encode(), digest_size=8).digest()
    assert text_id(spelled) == int.from_bytes(eight, "little") // 2
    raw = raw_digests([spelled, plain, spelled])
    assert raw.tolist() == [
        hashlib.blake2b(text.encode(), digest_size=16).digest() for text in (spelled, plain, spelled)
    ]
    assert raw_digests([]).shape == (0,)


def test_a_digest_that_ends_in_zero_bytes_is_still_told_from_others():
    """numpy's bytes arrays drop zeros at the end, which must not make two texts one."""
    texts = [str(number) for number in range(2000)]
    digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
    assert any(digest.endswith(b"\0") for digest in digests)
    assert len(set(raw_digests(texts).tolist())) == 2000


def test_texts_far_apart_on_disk_are_read_one_by_one(monkeypatch):
    texts = ["first", "x" * 5000, "\u00e9", "y" * 5000, "last"]
    monkeypatch.setattr(texts_module, "_BUFFER_BYTES", 100)
    on_disk, reads = TextsOnDisk(texts), []
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, start: reads.append(length) or read(file, length, start))
    assert on_disk[::2] == ["first", "\u00e9", "last"]
    assert reads == [5, 2, 4]
    reads.clear()
    assert on_disk[:3] == texts[:3]
    assert reads == [5007]
    part = on_disk.at(np.array([4, 0]))
    assert (list(part), len(part), part[-1]) == (["last", "first"], 2, "first")
    assert len(on_disk) == 5


def test_a_read_that_gives_less_than_was_asked_for_is_gone_on_with(monkeypatch):
    """As Linux does beyond 2 GiB."""
    on_disk, read = TextsOnDisk(["ab\u00e9cdefg", "h"]), os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, start: read(file, min(length, 3), start))
    assert on_disk[:] == ["ab\u00e9cdefg", "h"]


def test_a_text_has_another_raw_digest_with_each_instruction_of_its_own():
    instructions = [None, "", "a", "ab", "b"]
    digests = raw_digests(["bc"] * 5, instructions).tolist()
    assert len(set(digests)) == 5
    # Where the instruction ends is part of it: "a" + "bc" and "ab" + "c" have the same letters.
    assert raw_digests(["bc", "c"], ["a", "ab"]).tolist()[1] not in digests
    assert digests[0] == raw_digests(["bc"])[0] == raw_digests(["bc"], [None])[0]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("How do I reset it?", "how do i  reset it"),
        ("Straße: (re)start", "STRASSE re start"),
        ("it's - a-b,\n\tc", "It S A B C"),
        ("É", "e\u0301"),
        ("a\u00a0b", "A b."),
        (" ?! ", "?!"),
    ],
)
def test_texts_that_differ_in_case_spacing_and_punctuation_fold_to_one(text, same):
    assert folded(text) == folded(same)
    assert folded_id(text) == folded_id(same)


@pytest.mark.parametrize(
    ("text", "other"), [("C++", "C#"), ("?", "!"), ("?", "??"), ("a b", "ab"), ("C", "C++"), ("e", "é"), ("1/2", "1 2")]
)
def test_texts_that_differ_otherwise_stay_two(text, other):
    assert folded(text) != folded(other)


@given(text=st.text(alphabet="aB ?!-'\u00e9\u0301\u0130\u00df\u03c2#\u00a0\n", min_size=1).filter(str.strip))
def test_texts_that_are_one_by_either_rule_fold_to_one(text):
    assert folded(text)
    assert folded(canonical(text)) == folded(text)
    by_the_rule = re.sub(r"""[\s.,;:!?'"()-]+""", " ", text.casefold()).strip()
    if by_the_rule:
        assert folded(by_the_rule) == folded(text)
    else:
        assert folded(text) == canonical(text)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("size", [1, 2**21])  # told by flush, and by write
def test_texts_that_do_not_fit_into_tmpdir_are_an_error_that_names_it(monkeypatch, size):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda buffering: io.BufferedWriter(io.FileIO("/dev/full", "w")))
    with pytest.raises(UserError, match="TMPDIR: texts cannot be written there: No space left on device; make room"):
        TextsOnDisk(["x" * size])
