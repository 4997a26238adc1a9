"""Texts are found in the segments that hold them."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedding_finetune.data.texts import raw_digests
from embedding_finetune.retrieval.segment_index import SegmentIndex

A, B = Path("a.segment"), Path("b.segment")


def index_of(**texts):
    return SegmentIndex.of([(Path(f"{name}.segment"), raw_digests(of_segment)) for name, of_segment in texts.items()])


def found(index, wanted):
    """Wanted text -> its segment and row."""
    return {
        wanted[match]: (path, row)
        for path, matches, rows in index.places(raw_digests(wanted))
        for match, row in zip(matches.tolist(), rows.tolist(), strict=True)
    }


def test_a_text_is_found_in_its_segment_and_row_and_others_are_not():
    index = index_of(a=["one", "two", "three"], b=["four"])
    assert found(index, ["three", "none", "four", "one"]) == {"three": (A, 2), "four": (B, 0), "one": (A, 0)}
    assert found(index_of(), ["one"]) == {}
    assert found(index, []) == {}


def test_a_text_in_two_segments_is_found_in_the_first():
    assert found(index_of(a=["one", "two"], b=["two"]), ["two", "two"]) == {"two": (A, 1)}


@given(st.lists(st.lists(st.integers(0, 30), unique=True, max_size=8), max_size=4), st.lists(st.integers(0, 35)))
def test_places_are_those_that_looking_through_all_segments_gives(segments, wanted):
    texts = [[str(number) for number in segment] for segment in segments]
    index = SegmentIndex.of([(Path(str(number)), raw_digests(segment)) for number, segment in enumerate(texts)])
    expected = {
        text: (Path(str(number)), segment.index(text))
        for text in map(str, wanted)
        for number, segment in reversed(list(enumerate(texts)))
        if text in segment
    }
    assert found(index, [str(number) for number in wanted]) == expected
    assert len(np.unique(index.digests)) == len({text for segment in texts for text in segment})
