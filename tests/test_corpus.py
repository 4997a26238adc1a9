import unicodedata

from helpers.data import write_beir
from hypothesis import given
from hypothesis import strategies as st

from embedding_finetune.data.corpus import Corpus, read_corpus

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


@given(texts=st.lists(SPELLINGS, max_size=20), wanted=st.lists(SPELLINGS, max_size=5))
def test_all_places_of_a_text_are_those_that_a_look_at_every_text_finds(texts, wanted, tmp_path_factory):
    names = {plain(text) for text in wanted}
    corpus = Corpus(texts)
    assert corpus.positions_of_all(wanted) == {
        plain(text): [place] for place, text in enumerate(corpus.texts[:]) if plain(text) in names
    }
    if any(text.strip() for text in texts):
        path = tmp_path_factory.mktemp("beir")
        documents = read_corpus(write_beir(path / "b", {f"d{n:02}": text for n, text in enumerate(texts)}, {}))
        expected = {}
        for place, text in enumerate(documents.texts[:]):
            if plain(text) in names:
                expected.setdefault(plain(text), []).append(place)
        assert documents.positions_of_all(wanted) == expected
