"""Rows, queries and passages as they have to be, and the place and field of what is not."""

import pytest
from helpers.data import write_jsonl

from embedding_finetune.command_line import UserError
from embedding_finetune.data import jsonl, records

GOOD = b'{"query": "q", "pos": ["p"]}\n'


def read_rows(path):
    return list(records.read_training_rows(path))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{nonsense\n", "not valid JSON"),
        (b'["a list"]\n', "expected an object"),
        (b'{"pos": ["p"]}\n', '"query" is missing'),
        (b'{"query": 3, "pos": ["p"]}\n', '"query" is a int'),
        (b'{"query": "  ", "pos": ["p"]}\n', '"query" is an empty string'),
        (b'{"query": "q"}\n', '"pos" is missing'),
        (b'{"query": "q", "pos": "p"}\n', '"pos" is a str, expected a list'),
        (b'{"query": "q", "pos": []}\n', '"pos" is empty'),
        (b'{"query": "q", "pos": ["p", ""]}\n', '"pos"[1] is an empty string'),
        (b'{"query": "q", "pos": ["p"], "neg": ["n", 5]}\n', '"neg"[1] is a int'),
        (b'{"query": "q", "pos": ["p"], "neg": "n"}\n', '"neg" is a str'),
        (b'{"query": "q", "pos": ["\\ud800"]}\n', "surrogate"),
        (b'{"query": "q\xff", "pos": ["p"]}\n', "not UTF-8"),
    ],
)
def test_a_wrong_line_is_named_by_path_and_number(tmp_path, line, complaint):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + line)
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_candidates_and_pool_lines_give_the_same_passages(tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_text('{"context": ["a", "b"]}\n{"text": "c"}\n')
    assert list(records.read_passages(path)) == ["a", "b", "c"]
    path.write_text('{"texts": "c"}\n')
    with pytest.raises(UserError, match=r'pool\.jsonl:1: neither "context" nor "text"'):
        list(records.read_passages(path))


def test_null_is_the_same_as_missing_where_a_field_may_be_missing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "q", "pos": ["p"], "neg": null, "pos_scores": null}\n')
    assert [row.get("neg", []) for row in read_rows(path)] == [[]]
    path.write_text('{"query": "q", "pos": ["p"], "id": null, "group": null}\n')
    assert list(records.read_queries(path)) == [{"query": "q", "pos": ["p"]}]
    path.write_text('{"context": null, "text": "a"}\n{"context": ["b"], "text": null}\n')
    assert list(records.read_passages(path)) == ["a", "b"]
    for line in ('{"query": null, "pos": ["p"]}', '{"query": "q", "pos": null}', '{"query": "q", "pos": [null]}'):
        path.write_text(line + "\n")
        with pytest.raises(UserError, match=r"a\.jsonl:1: .*NoneType, expected"):
            read_rows(path)


def test_fields_that_are_not_used_are_counted_once_for_a_file(tmp_path, caplog):
    train, queries, pool = tmp_path / "train.jsonl", tmp_path / "queries.jsonl", tmp_path / "pool.jsonl"
    row = {"query": "q", "pos": ["p"]}
    jsonl.write(
        train,
        [{**row, "source": "x", "neg": [], "neg_scores": []}] * 29 + [{**row, "type": "y"}, {**row, "type": None}],
    )
    jsonl.write(queries, [{**row, "id": 1, "group": "g", "neg": ["n"]}])
    jsonl.write(pool, [{"text": "a", "title": "t"}, {"context": ["b"], "text": "c"}, {"text": "d"}])
    with caplog.at_level("INFO"):
        assert len(read_rows(train)) == 31
        list(records.read_queries(queries))
        list(records.read_passages(pool))
    assert [record.getMessage().removeprefix(f"{tmp_path}/") for record in caplog.records] == [
        'train.jsonl: ignored: "source" in 29 rows, "neg_scores" in 29 rows, "type" in 1 rows',
        'queries.jsonl: ignored: "neg" in 1 rows',
        'pool.jsonl: ignored: "title" in 1 rows, "text" in 1 rows',
    ]
    caplog.clear()
    with caplog.at_level("INFO"):
        list(records.read_training_rows(train, known=records.SCORE_FIELDS, others_are_kept=True))
    assert caplog.messages == [f'{train}: kept and written, but not used: "source" in 29 rows, "type" in 1 rows']
    caplog.clear()
    jsonl.write(train, [{**row, **dict.fromkeys(map(str, range(12)), 0), "a\nb": 1}])
    with caplog.at_level("INFO"):
        read_rows(train)
    assert caplog.messages[0].endswith('"9" in 1 rows, and 3 other fields')


def test_an_id_that_no_file_can_hold_is_named_by_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "q", "pos": ["p"], "id": "\\ud800"}\n')
    with pytest.raises(UserError, match=r'a\.jsonl:1: "id" holds half a surrogate pair'):
        list(records.read_queries(path))


def test_a_document_of_a_beir_corpus_is_its_title_and_its_text(tmp_path, caplog):
    documents = [
        {"_id": "1", "title": "Pumps", "text": "Press the handle."},
        {"_id": "2", "title": "", "text": " Only text "},
        {"_id": "3", "title": "Only a title", "text": "", "metadata": {}},
        {"_id": "4", "title": None, "text": "  "},
        {"_id": "5", "text": "No title"},
        {"_id": "6"},
    ]
    path = write_jsonl(tmp_path / "corpus.jsonl", documents)
    # As beir's GenericDataLoader and its models join them.
    joined = [((d.get("title") or "") + " " + (d.get("text") or "")).strip() for d in documents]
    with caplog.at_level("INFO"):
        assert list(records.read_passages(path)) == [text for text in joined if text]
    assert f"{path}: 2 documents have neither title nor text, and are skipped" in caplog.messages
    write_jsonl(path, documents[3:4] * 2)
    with pytest.raises(UserError, match=r"corpus\.jsonl: none of the 2 documents has a title or text"):
        list(records.read_passages(path))
    for wrong, kind in (({"_id": "1", "title": 0, "text": "x"}, "int"), ({"_id": "1", "text": ["x"]}, "list")):
        write_jsonl(path, [wrong])
        with pytest.raises(UserError, match=rf"corpus\.jsonl:1: \"\w+\" is a {kind}, expected a string"):
            list(records.read_passages(path))


def test_ids_are_unique_over_all_files_of_a_folder(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, [{"id": f"{name} 1".replace(" ", "-"), "query": "q", "pos": ["p"]}])
    assert len(list(records.read_queries(tmp_path))) == 2
    write_jsonl(tmp_path / "c.jsonl", [{"query": "q", "pos": ["p"], "id": "a.jsonl-1"}])
    with pytest.raises(UserError, match=r"c\.jsonl:1: \"id\" 'a\.jsonl-1' is already in .*a\.jsonl:1$"):
        list(records.read_queries(tmp_path))


def test_a_table_without_passages_names_its_columns_and_the_flag(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("title,body\na,b\n")
    for columns, names in (([], '"text"'), (["text=content"], '"content" nor "text"')):
        with pytest.raises(UserError) as error:
            list(records.read_passages(path, columns))
        assert str(error.value) == (
            f'{path}: row 2: neither "context" nor {names} is there; expected {{"context": [str, ...]}} or {{"text": '
            'str}; the columns are "title", "body": --columns text=COLUMN says which it is'
        )
    assert list(records.read_passages(path, ["text=body"])) == ["b"]


def test_a_log_line_counts_queries_with_an_instruction_of_their_own(tmp_path, caplog):
    rows = [{"query": "q", "pos": ["p"], "instruction": text} for text in ("find: ", "", None)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"query": "q", "pos": ["p"]}])
    for read in (records.read_training_rows, records.read_queries):
        caplog.clear()
        with caplog.at_level("INFO"):
            assert len(list(read(path))) == 4
        assert "rows.jsonl: 2 queries have an instruction of their own" in caplog.text
