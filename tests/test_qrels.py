"""Qrels as BEIR and TREC write them. Their errors, with those of the folder, are in test_beir.py."""

import gzip

import pytest

from embedding_finetune.command_line import UserError
from embedding_finetune.data.qrels import read_qrels


def test_a_first_line_of_data_is_not_taken_for_a_header(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("q1\td1\t2\nq1\td2\t0\n")
    assert read_qrels(path) == {"q1": {"d1": 2, "d2": 0}}
    path.write_text("query_id\tdoc_id\trelevance\nq1\td1\t2\nq1\td1\t2\n")
    assert read_qrels(path) == {"q1": {"d1": 2}}


def test_a_pair_that_is_judged_twice_alike_counts_once_and_otherwise_is_an_error(tmp_path):
    path = tmp_path / "q.tsv"
    path.write_text("query-id\tcorpus-id\tscore\nq\td\t2\nq\te\t-1\nq\td\t2\n")
    assert read_qrels(path) == {"q": {"d": 2, "e": -1}}
    path.write_text(path.read_text() + "\nq\td\t1\n")
    with pytest.raises(UserError, match=r"q\.tsv:6: query 'q' and document 'd' have the score 1, and 2"):
        read_qrels(path)


def test_compressed_judgements_with_windows_line_ends_are_read_and_cut_ones_are_named(tmp_path):
    path = tmp_path / "q.tsv.gz"
    packed = gzip.compress(b"\xef\xbb\xbfquery-id\tcorpus-id\tscore\r\nq\td\t1\r\n", mtime=0)
    path.write_bytes(packed)
    assert read_qrels(path) == {"q": {"d": 1}}
    path.write_bytes(packed[:-9])
    with pytest.raises(UserError, match=r"q\.tsv\.gz:\d: cannot be read"):
        read_qrels(path)
