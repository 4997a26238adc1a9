"""What must not become a row's negatives, and why, beside its definition row by row."""

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedding_finetune.data.corpus import Corpus
from embedding_finetune.mining.exclusions import ExcludedTexts

TEXTS = [f"text {number}" for number in range(8)]
CORPUS = Corpus(TEXTS[:6], beyond=TEXTS[6:7])  # the last text is nowhere


def excluded_by_definition(rows, near, row):
    """In ascending order of what counts more; -1 stands for no text of the corpus."""
    of_query = [other for other in rows if other["query"].strip() == row["query"].strip()]
    answers = {CORPUS.positions([text])[0] for other in of_query for text in other["pos"]}
    reasons = {passage: "near-duplicate of a positive" for positive, passage in near if positive in answers}
    reasons[CORPUS.positions([row["query"]])[0]] = "the query itself"
    reasons |= dict.fromkeys(answers, "positive of the same query in another row")
    reasons |= dict.fromkeys(CORPUS.positions(row["pos"]).tolist(), "positive")
    return {position: reason for position, reason in reasons.items() if position >= 0}


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "query": st.sampled_from(["a", " a", "b", TEXTS[0], f"{TEXTS[0]} "]),
            "pos": st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3),
        }
    ),
    max_size=6,
)
NEAR = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=4)


@given(ROWS, NEAR)
def test_rows_that_share_a_query_exclude_its_answers_each_with_its_own_reasons(rows, near):
    excluded = ExcludedTexts(rows, CORPUS, np.array(near, dtype=np.int64).reshape(-1, 2))
    for number, row in enumerate(rows):
        expected, found = excluded_by_definition(rows, near, row), excluded.of(number)
        assert dict(found) == expected
        assert len(found) == len(expected)
        assert [position in found for position in range(-1, 9)] == [position in expected for position in range(-1, 9)]


def test_thousands_of_rows_of_one_query_take_no_longer_than_as_many_queries():
    def seconds(queries):
        rows = [{"query": f"query {number % queries}", "pos": [f"text {number}"]} for number in range(4000)]
        excluded = ExcludedTexts(rows, corpus, np.empty((0, 2), dtype=np.int64))
        began = time.process_time()
        assert all(number in excluded.of(number) for number in range(4000))
        return time.process_time() - began

    corpus = Corpus(f"text {number}" for number in range(4000))
    # A copy of all answers for each row took 2,000 times as long.
    assert min(seconds(1) for _ in range(3)) < 20 * max(seconds(4000) for _ in range(3))
