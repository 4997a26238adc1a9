import numpy as np

from embedding_finetune.mining.candidates import Candidates, window_scores


def test_the_window_is_scored_pair_by_pair_and_has_no_score_past_the_end():
    ranking = np.array([[4, 2, 3, 1], [0, 5, 6, -1]])
    candidates = Candidates(
        ranking=ranking,
        window_scores=np.empty((2, 2), np.float32),
        pair_scores=np.empty(0, np.float32),
        near_duplicates=np.empty((0, 2), np.int64),
        score=lambda pairs: (10 * pairs.rows + pairs.positions).astype(np.float32),
        weights_digests={},
        witnesses={},
    )
    assert candidates.window == (2, 4)
    assert window_scores(candidates, 2).tolist() == [[3, 1], [16, -np.inf]]
