"""What a file of judgements means: which line holds, what a row becomes, and what is told of it."""

import pytest
from helpers.data import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from embedding_finetune.command_line import UserError
from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.judgements import (
    NO_JUDGEMENTS,
    Judgements,
    check_judgement_paths,
    read_judgements,
    settle_rows,
)
from embedding_finetune.data.task import make_task
from embedding_finetune.data.texts import canonical


def judged(query, passage, relevant):
    return {"query": query, "passage": passage, "relevant": relevant}


def test_the_later_line_holds_whatever_the_spelling_and_null_settles_nothing(tmp_path, caplog):
    first = [judged("q", "a", True), judged("q", "b", False), judged(" q", "e\u0301", True), judged("r", "a", None)]
    second = [judged("q", "\u00e9 ", False), judged("q", "a", None), judged("q", "b", False)]
    files = [str(write_jsonl(tmp_path / f"{n}.jsonl", lines)) for n, lines in enumerate((first, second))]
    with caplog.at_level("INFO"):
        judgements = read_judgements(files)
    assert judgements.of("q ") == (["a"], ["\u00e9 ", "b"])
    assert judgements.of("r") == ([], [])
    assert len(judgements) == 3
    assert "3 judgements; 2 lines without an answer (null) are skipped, 1 were contradicted" in caplog.text


def test_fields_of_a_file_of_doubts_are_no_obstacle(tmp_path):
    line = {**judged("q", "a", True), "positive": "b", "models": {"m": {"rank": 1}}}
    assert read_judgements([str(write_jsonl(tmp_path / "j.jsonl", [line]))]).of("q").relevant == ["a"]


def test_a_query_that_is_a_passage_too_does_not_answer_itself():
    row = {"query": "q", "pos": ["a"]}
    for relevant in (True, False):
        judgements = Judgements([("q", " q", relevant)])
        assert len(judgements) == 0
        assert list(settle_rows([row], judgements, "f")) == [(row, 0)]
        assert make_task([row], Corpus(["a", "q"]), judgements).relevant == [{0: 1}]


def test_folders_and_names_of_tables_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--judgements: .* is a folder; give files of judgements"):
        check_judgement_paths([str(tmp_path)])
    with pytest.raises(UserError, match=r"--doubts_file .*d\.csv: JSON Lines are written; give a name that ends in"):
        check_judgement_paths([], str(tmp_path / "d.csv"))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ({"passage": "a", "relevant": True}, '"query" is missing or no text; expected the text of the query'),
        (judged("q", " ", True), '"passage" is missing or no text'),
        (judged("q", ["a"], True), '"passage" is missing or no text'),
        ({"query": "q", "passage": "a"}, '"relevant" is missing, expected true, false or null'),
        (judged("q", "a", "yes"), "\"relevant\" is 'yes', expected true, false or null"),
        (judged("q", "a", 1), '"relevant" is 1, expected'),
    ],
)
def test_a_line_of_another_kind_is_named(tmp_path, line, what):
    path = write_jsonl(tmp_path / "j.jsonl", [judged("q", "a", True), line])
    with pytest.raises(UserError, match=f"j.jsonl:2: {what}"):
        read_judgements([str(path)])


def test_half_a_surrogate_pair_is_named(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"query": "q", "passage": "\\ud800", "relevant": true}\n')
    with pytest.raises(UserError, match=r'j.jsonl:1: "passage" holds half a surrogate pair'):
        read_judgements([str(path)])


def test_a_row_gets_further_positives_and_its_confirmed_negatives_first(caplog):
    judgements = Judgements(
        [("q", "new", True), ("q", " old", True), ("q", "n2 ", False), ("q", "never seen", False), ("q", "q", False)]
    )
    rows = [
        {"query": "q", "pos": ["old"], "neg": ["n1", "new", "n2"], "neg_scores": [1, 2, 3], "id": 7},
        {"query": "other", "pos": ["new"], "neg": ["n2"], "neg_scores": [1]},
        {"query": "q ", "pos": ["old"]},
    ]
    with caplog.at_level("INFO"):
        settled = list(settle_rows(rows, judgements, "rows.jsonl"))
    first = {"query": "q", "pos": ["old", "new"], "neg": ["n2 ", "never seen", "n1"], "id": 7}
    third = {"query": "q ", "pos": ["old", "new"], "neg": ["n2 ", "never seen"]}
    assert settled == [(first, 2), (rows[1], 0), (third, 2)]
    assert "rows.jsonl: 4 of 4 judgements are about its queries, and add 2 positives" in caplog.text


def test_a_positive_of_the_data_stays_one_and_unknown_queries_are_counted(caplog):
    judgements = Judgements([("q", "a", False), ("unknown", "a", True), ("unknown", "b", False)])
    with caplog.at_level("INFO"):
        assert list(settle_rows([{"query": "q", "pos": ["a"]}], judgements, "f")) == [
            ({"query": "q", "pos": ["a"], "neg": []}, 0)
        ]
    assert "f: 1 of 3 judgements are about its queries, and add 0 positives" in caplog.text
    assert "warning: f: 1 judgements say that a positive of the data answers nothing: the data count" in caplog.text


def test_without_judgements_rows_stay_as_they_are_and_nothing_is_told(caplog):
    row = {"query": "q", "pos": ["a"], "neg_scores": [1]}
    with caplog.at_level("INFO"):
        ((settled, confirmed),) = settle_rows([row], NO_JUDGEMENTS, "f")
    assert settled is row
    assert (confirmed, caplog.text) == (0, "")


TEXTS = st.sampled_from(["a", "b", " a", "c", "d ", "e\u0301", "\u00e9"])


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"query": TEXTS, "pos": st.lists(TEXTS, min_size=1, max_size=3), "neg": st.lists(TEXTS, max_size=4)}
        )
    ),
    lines=st.lists(st.tuples(TEXTS, TEXTS, st.booleans()), max_size=20),
)
def test_settled_rows_hold_what_was_judged(rows, lines):
    pairs = [(canonical(query), canonical(passage), relevant) for query, passage, relevant in lines]
    last = {(query, passage): relevant for query, passage, relevant in pairs if query != passage}
    for row, (settled, confirmed) in zip(rows, settle_rows(rows, Judgements(lines), "f"), strict=True):
        query = canonical(row["query"])
        labelled, before = ({canonical(text) for text in row[field]} for field in ("pos", "neg"))
        positives, negatives = ([canonical(text) for text in settled[field]] for field in ("pos", "neg"))
        relevant = {passage for (of, passage), answer in last.items() if of == query and answer}
        refused = {passage for (of, passage), answer in last.items() if of == query and not answer}
        assert settled["pos"][: len(row["pos"])] == row["pos"]
        assert set(positives) == labelled | relevant
        assert set(negatives[:confirmed]) == refused - set(positives) - {query}
        if relevant | refused:
            assert set(negatives) - set(negatives[:confirmed]) == before - set(positives) - refused - {query}


def test_a_file_with_answers_is_not_replaced_by_new_doubts(tmp_path):
    doubts = write_jsonl(tmp_path / "d.jsonl", [judged("q", "a", None)])
    check_judgement_paths([], str(doubts))
    write_jsonl(doubts, [judged("q", "a", None), judged("q", "b", False)])
    with pytest.raises(UserError, match=r"--doubts_file .*there are answers in it, which would be lost"):
        check_judgement_paths([], str(doubts))
    doubts.write_text("a letter to a friend\n")
    with pytest.raises(UserError, match=r"--doubts_file .*is no file of doubts, and would be replaced"):
        check_judgement_paths([], str(doubts))
    write_jsonl(doubts, [{"query": "q", "pos": ["a"]}])
    with pytest.raises(UserError, match=r"is no file of doubts"):
        check_judgement_paths([], str(doubts))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--judgements: .*nowhere.jsonl does not exist"):
        check_judgement_paths([str(tmp_path / "nowhere.jsonl")])
