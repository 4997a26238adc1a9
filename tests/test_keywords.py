"""BM25: words of any script, scores by their definition, and ties by position."""

import math

import numpy as np
import pytest
from helpers.data import TOPICS, passage_about, read_jsonl, write_evaluation, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

import evaluate
import mine_hard_neg
from embedding_finetune.mining.audit import _told_of_high_scores
from embedding_finetune.retrieval.keywords import KeywordIndex, words_of
from embedding_finetune.retrieval.results import positions_of, scores_of


def index_of(passages):
    return KeywordIndex(iter(passages), len(passages))


def ranking(passages, queries, top_k, ties="first", among=None):
    results = index_of(passages).results(queries, top_k, ties=ties, among=among or len(passages))
    return positions_of(results, ties).tolist(), scores_of(results)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Reset the PUMP-2, now!", ["reset", "the", "pump", "2", "now"]),
        ("Größe STRASSE straße", ["grösse", "strasse", "strasse"]),
        ("\uff46\uff55\uff4c\uff4c \ufb01t", ["full", "fit"]),  # of full width, and a ligature
        ("重置水泵", ["重置", "置水", "水泵"]),
        ("泵", ["泵"]),
        ("USB线 pump泵阀", ["usb", "线", "pump", "泵阀"]),
        ("リセットする", ["リセ", "セッ", "ット", "トす", "する"]),
        ("펌프를 재설정", ["펌프를", "재설정"]),
        ("पंप को रीसेट", ["पंप", "को", "रीसेट"]),
        ("ปั๊ม", ["ปั", "ั๊", "๊ม"]),
        ("यह है।", ["यह", "है"]),
        ("\u0643\u064e\u062a\u064e\u0628\u064e", ["\u0643\u064e\u062a\u064e\u0628\u064e"]),  # vowels of Arabic
        ("foo_bar", ["foo", "bar"]),
        ("བོད་སྐད", ["བོད", "སྐད"]),
        ("... ?!", []),
        ("", []),
    ],
)
def test_words_are_runs_of_letters_and_pairs_of_characters_where_nothing_is_spaced(text, words):
    assert words_of(text) == words


def bm25(passages, query):
    """Lucene's formula, word by word (Kamphuis et al., ECIR 2020)."""
    documents = [words_of(passage) for passage in passages]
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in words_of(query):
            containing = sum(word in other for other in documents)
            if containing:
                idf = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
                count = document.count(word)
                score += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(document) / average))
        scores.append(score)
    return scores


TEXTS = st.lists(st.lists(st.sampled_from("a b c d 泵阀 門".split()), max_size=6).map(" ".join), min_size=1, max_size=9)


@given(passages=TEXTS, query=st.lists(st.sampled_from("a b 泵阀 x".split()), max_size=4).map(" ".join), data=st.data())
def test_rankings_are_those_of_the_formula_and_ties_go_by_position(passages, query, data):
    ties = data.draw(st.sampled_from(["first", "last"]))
    top_k = data.draw(st.integers(1, 10))
    expected = bm25(passages, query)
    (positions,), (scores,) = ranking(passages, [query], top_k, ties)
    found = [position for position in positions if position >= 0]
    assert len(found) == min(top_k, sum(score > 0 for score in expected))
    assert positions[len(found) :] == [-1] * (top_k - len(found))
    assert scores[: len(found)] == pytest.approx([expected[position] for position in found], rel=1e-5)
    exact = index_of(passages).pair_scores([query], np.zeros(len(passages), int), np.arange(len(passages)))
    assert exact == pytest.approx(expected, rel=1e-5, abs=1e-7)
    order = np.lexsort((np.arange(len(passages)) * (1 if ties == "first" else -1), -exact))
    assert found == [position for position in order.tolist() if exact[position] > 0][: len(found)]


def test_texts_beyond_the_corpus_are_scored_and_not_ranked():
    passages = ["pump", "valve", "pump pump"]
    assert ranking(passages, ["pump"], 3, among=2)[0] == [[0, -1, -1]]
    assert index_of(passages).pair_scores(["pump"], np.array([0]), np.array([2]))[0] > 0


def test_passages_without_words_are_in_no_ranking():
    assert ranking(["...", "?"], ["pump", "..."], 2)[0] == [[-1, -1], [-1, -1]]


@pytest.fixture
def data(tmp_path):
    return write_evaluation(tmp_path)


def mined(names, data, tmp_path, *flags):
    output = tmp_path / "mined.jsonl"
    argv = ["--model_name_or_path", *names, "--input_file", data[3], "--candidate_pool", data[1]]
    argv += ["--output_file", str(output), "--range_for_sampling", "0-4", "--negative_number", "2"]
    mine_hard_neg.main([*argv, "--sampling_strategy", "top", *flags])
    return read_jsonl(output)


def test_mining_with_keywords_alone_takes_the_passages_that_share_words(data, tmp_path):
    rows = mined(["bm25"], data, tmp_path, "--save_scores")
    for row in rows:
        assert len(row["neg"]) == 2
        scores = bm25([passage_about(topic) for topic in TOPICS], row["query"])
        assert row["pos_scores"] == pytest.approx([max(scores)], rel=1e-5)
        assert row["neg_scores"] == pytest.approx(sorted(scores)[-3:-1][::-1], rel=1e-5)


def test_the_audit_of_keywords_alone_advises_no_flag_that_is_refused():
    settings = {"sampling_strategy": "random", "range_for_sampling": (2, 9), "model_name_or_path": ["bm25"]}
    (line,) = _told_of_high_scores({"negatives_above_their_positive": 0.5, "settings": settings})
    assert "--relative_margin 0.05 with a model beside bm25 leaves out" in line
    settings["reranker_name_or_path"] = "some/reranker"
    (line,) = _told_of_high_scores({"negatives_above_their_positive": 0.5, "settings": settings})
    assert "; --relative_margin 0.05 leaves out" in line


def test_in_a_fusion_scores_stay_those_of_the_model_wherever_keywords_stand(tiny_bert, data, tmp_path):
    first = mined(["bm25", str(tiny_bert)], data, tmp_path, "--save_scores", "--max_score", "0.999")
    last = mined([str(tiny_bert), "bm25"], data, tmp_path, "--save_scores", "--max_score", "0.999")
    alone = mined([str(tiny_bert)], data, tmp_path, "--save_scores")
    assert first == last
    assert [row["pos_scores"] for row in first] == [row["pos_scores"] for row in alone]
    assert all(-1 <= score <= 1 for row in first for score in row["neg_scores"])


@pytest.mark.parametrize("flag", ["--max_score", "--absolute_margin", "--near_duplicate_threshold"])
def test_flags_that_need_cosines_are_refused_with_keywords_alone(data, tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as exit:
        mined(["bm25"], data, tmp_path, flag, "0.5")
    assert exit.value.code == 2
    assert f"{flag}: the scores of bm25 are no cosines; name a model beside it" in capsys.readouterr().err


def test_in_a_beir_folder_with_equal_documents_a_query_without_common_words_ranks_nothing(tmp_path):
    (tmp_path / "qrels").mkdir()
    texts = ["reset the pump", "reset the pump", "open the gate"]
    documents = [{"_id": f"d{number}", "title": "", "text": text} for number, text in enumerate(texts)]
    write_jsonl(tmp_path / "corpus.jsonl", documents)
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "a", "text": "the gate"}, {"_id": "b", "text": "xyz"}])
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\na\td2\t1\nb\td0\t1\n")
    files = ["--index_file_jsonl_path", str(tmp_path), "--query_file_jsonl_path", str(tmp_path)]
    assert evaluate.main(["--model_name", "bm25", *files])["MRR@10"] == 0.5
