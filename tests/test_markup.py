from embedding_finetune.evaluation.markup import table


def test_a_tables_first_column_names_its_rows_and_texts_are_escaped():
    html = table(["", "a<b"], [["x&y", "1"], ["z", "2"]])
    assert html == (
        '<div class="wide"><table><tr><th scope="col"></th><th scope="col">a&lt;b</th></tr>'
        '<tr><th scope="row">x&amp;y</th><td>1</td></tr><tr><th scope="row">z</th><td>2</td></tr></table></div>'
    )
