"""Which segment of an embedding store holds a text, and in which row.

Shapes: M texts in all segments, W texts that are wanted.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class SegmentIndex(NamedTuple):
    """Where each text is: the digests (M,) of all segments, sorted, with the segment and the row of each.

    paths: of the segments. segment_of: (M,), numbers of paths. row_of: (M,), rows of these segments. checked: segments
    whose checksum was found right.
    """

    paths: list[Path]
    digests: np.ndarray
    segment_of: np.ndarray
    row_of: np.ndarray
    checked: set[Path]

    @classmethod
    def of(cls, segments: Sequence[tuple[Path, np.ndarray]]) -> "SegmentIndex":
        """The index of segments, each with the digests (n,) of its texts."""
        counts = [len(digests) for _, digests in segments]
        all_digests = np.concatenate([np.empty(0, "S16"), *(digests for _, digests in segments)])
        order = np.argsort(all_digests, kind="stable")
        segment_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order]
        row_of = np.concatenate([np.empty(0, np.int32), *(np.arange(count, dtype=np.int32) for count in counts)])[order]
        return cls([path for path, _ in segments], all_digests[order], segment_of, row_of, set())

    def places(self, wanted: np.ndarray) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
        """Segment by segment: its path, which of the wanted digests (W,) it holds, and the row of each."""
        if not len(self.digests):
            return
        places = np.searchsorted(self.digests, wanted).clip(max=len(self.digests) - 1)
        matches = np.flatnonzero(self.digests[places] == wanted)
        segments, rows = self.segment_of[places[matches]], self.row_of[places[matches]]
        for segment in np.unique(segments):
            here = segments == segment
            yield self.paths[segment], matches[here], rows[here]
