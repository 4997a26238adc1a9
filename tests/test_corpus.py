import unicodedata

from helpers.data import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from embedding_finetune.data.corpus import Corpus, load_task

SPELLINGS = st.sampled_from(["a", " a", "b\n", "\u00e9", "e\u0301", "A", "\x00", "\U0001f600 text", "long " * 50])


def plain(text):
    return unicodedata.normalize("NFC", text).strip()


@given(texts=st.lists(st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs"])) | SPELLINGS, max_size=30))
def test_a_corpus_is_the_distinct_texts_in_first_seen_order(texts):
    expected = {}
    for text in texts:
        expected.setdefault(plain(text), text)
    corpus = Corpus(iter(texts))
    assert corpus.texts[:] == list(expected.values())
    assert (len(corpus), corpus.duplicates) == (len(expected), len(texts) - len(expected))
    places = {text: place for place, text in enumerate(expected)}
    assert corpus.positions(texts).tolist() == [places[plain(text)] for text in texts]


def test_texts_that_are_not_there_have_no_position():
    assert Corpus(["a", "b"]).positions(["c", " b ", "B"]).tolist() == [-1, 1, -1]
    assert Corpus([]).positions(["c"]).tolist() == [-1]
    assert Corpus(["a"]).positions([]).tolist() == []


def test_answers_are_found_by_canonical_text_and_counted_once(tmp_path, caplog):
    rows = write_jsonl(
        tmp_path / "queries.jsonl",
        [{"query": "q", "pos": ["e\u0301", "\u00e9 ", "absent"]}, {"query": "r", "pos": ["absent"]}],
    )
    task = load_task(rows, Corpus(["x", "\u00e9", "x "]))
    assert task.relevant == [{1: 1, 2: 1}, {3: 1}]
    assert (task.missing, task.unanswerable, task.corpus.duplicates) == (2, 1, 1)
    assert "2 positives are not in the corpus" in caplog.text
