"""Mining as one function: what it gives, in which order, and its audit."""

import numpy as np
from helpers.data import TOPICS, passage_about

from embedding_finetune.data.corpus import Corpus
from embedding_finetune.mining.arguments import RankingOptions
from embedding_finetune.mining.candidates import Pairs
from embedding_finetune.mining.negatives import mine_negatives
from embedding_finetune.mining.stopwatch import Stopwatch


def test_every_row_gets_the_best_passages_that_are_not_its_positives(tiny_bert):
    passages = [passage_about(topic) for topic in TOPICS]
    rows = [{"query": f"my {topic} is red", "pos": [text]} for topic, text in zip(TOPICS, passages)]
    options = RankingOptions(
        model_name_or_path=[str(tiny_bert)],
        range_for_sampling=(0, len(passages)),
        negative_number=4,
        sampling_strategy="top",
        dtype="float32",
    )
    corpus, stopwatch = Corpus(passages), Stopwatch()
    mined = mine_negatives(rows, corpus, options, stopwatch)
    every = mined.score(Pairs(*np.indices((10, 10)).reshape(2, -1))).reshape(10, 10)  # each row with each passage
    assert np.allclose(np.diag(every), mined.positive_scores, atol=1e-6)
    assert np.array_equal(mined.positive_scores, mined.lowest_positive)
    np.fill_diagonal(every, -np.inf)
    for scores, selection in zip(every, mined.selections):
        assert np.allclose(scores[selection.negatives], np.sort(scores)[::-1][:4], atol=1e-6)
    audit = mined.audit(corpus, options, stopwatch, dropped=3)
    assert (audit["rows"], audit["negatives"], audit["candidates"], audit["rows_dropped"]) == (10, 40, 10, 3)
    assert audit["settings"]["negative_number"] == 4
    assert list(audit["weights_sha256"]) == [str(tiny_bert)]
