"""report.html in a real browser: it opens, tells what metrics.json tells, sorts, searches, and runs no text as code."""

import json

import numpy as np
import pytest
from helpers import browser
from helpers.data import TOPICS, passage_about, read_jsonl, write_jsonl
from helpers.tiny import make_tiny_bert
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import evaluate
from embedding_finetune.data.corpus import Corpus
from embedding_finetune.data.task import load_task
from embedding_finetune.evaluation import query_table
from embedding_finetune.evaluation.page import first_ranks, html_report
from embedding_finetune.evaluation.ranking import values_per_query
from embedding_finetune.evaluation.summary import summarize
from embedding_finetune.retrieval.top_k import Ranking

HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\"><!--data-->"


@pytest.fixture(scope="module")
def chromium():
    with browser.open_browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tiny_bert):
    """The folder of a real evaluation: two models, groups, hostile texts, a positive that is not in the corpus."""
    folder = tmp_path_factory.mktemp("evaluated")
    other = make_tiny_bert(folder / "other", seed=7)
    passages = [*map(passage_about, TOPICS), f"the pump is {HOSTILE} red"]
    rows = [
        {"id": f"q{n}", "query": f"reset the {topic}", "pos": [passages[n]], "group": "odd" if n % 2 else "even"}
        for n, topic in enumerate(TOPICS)
    ]
    rows.append({"id": "q10", "query": f"what is {HOSTILE}?", "pos": ["nowhere to be found"], "group": HOSTILE})
    argv = ["--index_file_jsonl_path", write_jsonl(folder / "c.jsonl", [{"context": passages}])]
    argv += ["--query_file_jsonl_path", write_jsonl(folder / "q.jsonl", rows), "--output_dir", folder / "out"]
    argv += ["--cutoffs", 1, 3, 20, "--measures", "MRR", "Hit", "nDCG"]
    evaluate.main(["--model_name", str(tiny_bert), str(other), *map(str, argv)])
    return folder / "out"


def page_of(ranks_by_model, tmp_path, *, depth=10, queries=None, passage="passage {}"):
    """Write a report over a corpus of `depth` + 1 passages; each model ranks query q's passage 0 where it is told to.

    A rank of 0 leaves it out.
    """
    count = len(next(iter(ranks_by_model.values())))
    corpus = Corpus(passage.format(n) for n in range(depth + 1))
    rows = [{"query": (queries or "question {}").format(n), "pos": [corpus.texts[0]]} for n in range(count)]
    task = load_task(write_jsonl(tmp_path / "q.jsonl", rows), corpus)
    rankings = {}
    for name, ranks in ranks_by_model.items():
        positions = np.tile(np.arange(1, depth + 1), (count, 1))
        for row, rank in enumerate(ranks):
            if rank:
                positions[row] = np.insert(np.arange(1, depth), rank - 1, 0)
        rankings[name] = Ranking(positions, np.linspace(1, 0, depth, dtype=np.float32)[None].repeat(count, 0))
    argv = ["--model_name", *rankings, "--index_file_jsonl_path", __file__, "--query_file_jsonl_path", __file__]
    args = evaluate.parse_arguments(argv)
    values = {name: values_per_query(own, task, args.measures, args.cutoffs) for name, own in rankings.items()}
    document = summarize(values, task, args, weights_digests={}, trained_queries={"base": 3})
    (tmp_path / "report.html").write_text(html_report(document, task, rankings), encoding="utf-8")
    return tmp_path / "report.html"


def cells(driver, selector):
    """The texts of a table, row by row."""
    script = "return [...document.querySelectorAll(arguments[0])].map(r => [...r.cells].map(c => c.innerText))"
    return driver.execute_script(script, f"{selector} tr")


def query_rows(driver):
    return cells(driver, "#queries tbody")


def choose(driver, name):
    script = "const f = document.getElementById('filter'); f.value = arguments[0]; f.dispatchEvent(new Event('change'))"
    driver.execute_script(script, name)


def search_for(driver, text):
    script = "const s = document.getElementById('search'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    driver.execute_script(script, text)


def test_the_page_opens_without_errors_and_its_numbers_are_those_of_metrics_json(chromium, evaluated):
    chromium.get((evaluated / "report.html").as_uri())
    assert chromium.get_log("browser") == []
    document = json.loads((evaluated / "metrics.json").read_text())
    base, other = document["metrics"]
    (head, *rows) = cells(chromium, "#measures table")
    assert head[1:] == [base, other, "difference", "95% interval", "p"]
    assert [row[0] for row in rows] == list(document["metrics"][base])
    for name, *shown in rows:
        d = document["differences"][other][name]
        assert shown == [
            f"{document['metrics'][base][name]:.4f}",
            f"{document['metrics'][other][name]:.4f}",
            f"{d['mean']:+.4f}",
            f"{d['low']:+.4f} .. {d['high']:+.4f}",
            f"{d['p_holm']:.4f}",
        ]
    dots = chromium.execute_script("return [...document.querySelectorAll('circle title')].map(t => t.textContent)")
    assert sorted(dots) == sorted(
        f"{model}: {measure}@{k} {document['metrics'][model][f'{measure}@{k}']:.4f}"
        for model in (base, other)
        for measure in ("MRR", "Hit")
        for k in (1, 3, 20)
    )
    groups = cells(chromium, "section:has(> h2) .wide table")[1:]
    assert [(row[0], row[1]) for row in groups[::2]] == [(HOSTILE, "1"), ("even", "5"), ("odd", "5")]
    assert groups[2][3:] == [f"{value:.4f}" for value in document["groups"]["even"]["metrics"][base].values()]


def test_texts_stay_texts(chromium, evaluated):
    chromium.get((evaluated / "report.html").as_uri())
    choose(chromium, "all")
    assert f"what is {HOSTILE}?" in {row[0] for row in query_rows(chromium)}
    search_for(chromium, "onerror")
    chromium.execute_script("document.querySelectorAll('#queries tbody button').forEach(b => b.click())")
    assert HOSTILE in chromium.find_element("id", "queries").text
    assert not chromium.title.startswith("taken")
    assert chromium.execute_script("return document.querySelectorAll('img').length + document.scripts.length") == 2


def test_nothing_is_fetched_from_anywhere(chromium, evaluated):
    chromium.get((evaluated / "report.html").as_uri())
    assert chromium.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") in (
        [],
        ["data:,"],
    )


def test_wins_ranks_and_warnings_are_told(chromium, tmp_path):
    page = page_of({"base": [1, 1, 4, 0, 0, 7, 2], "tuned": [1, 3, 1, 0, 10, 9, 2]}, tmp_path)
    chromium.get(page.as_uri())
    assert "tuned against base: 2 better, 3 same, 2 worse" in chromium.find_element("id", "outcomes").text
    bars = {label: counts.split() for label, counts in cells(chromium, "#distribution table")[1:]}
    assert bars == {
        "1": ["2", "2"],
        "2": ["1", "1"],
        "3": ["0", "1"],
        "4-5": ["1", "0"],
        "6-10": ["1", "2"],
        "beyond 10": ["2", "1"],
    }
    assert "3 of 7 queries are in the training data of base" in chromium.find_element("id", "warnings").text


def test_worse_and_failing_queries_show_the_right_passage_and_what_was_above_it(chromium, tmp_path):
    page = page_of({"base": [1, 1, 4, 0], "tuned": [1, 3, 2, 0]}, tmp_path)
    chromium.get(page.as_uri())
    assert [row[1:] for row in query_rows(chromium)] == [["1", "3", "worse"]]
    button = chromium.find_element("css selector", "#queries tbody button")
    button.click()
    _, (shown,) = query_rows(chromium)
    assert shown.split("\n") == [
        *("right passage", "passage 0", "ranked above it by tuned"),
        *("1. (1.0000) passage 1", "answers it (y)", "does not (n)", "skip (s)"),
        *("2. (0.8889) passage 2", "answers it (y)", "does not (n)", "skip (s)", "id 1"),
    ]
    button.click()
    assert len(query_rows(chromium)) == 1
    choose(chromium, "not in the first 10")
    assert [row[1:] for row in query_rows(chromium)] == [["> 10", "> 10", ""]]
    choose(chromium, "not at rank 1")
    assert [row[0] for row in query_rows(chromium)] == ["question 1", "question 3", "question 2"]


def test_the_table_of_queries_sorts_and_searches(chromium, tmp_path):
    base = [1 + n % 9 for n in range(120)]
    page = page_of({"base": base, "tuned": [0 if n == 77 else 1 for n in range(120)]}, tmp_path, queries="question q{}")
    chromium.get(page.as_uri())
    choose(chromium, "all")
    assert len(query_rows(chromium)) == 50
    chromium.find_element("id", "more").click()
    rows = query_rows(chromium)
    assert len(rows) == 120
    names, before, after, _ = chromium.find_elements("css selector", "#queries thead button")
    before.click()
    assert [int(row[1]) for row in query_rows(chromium)] == sorted(base)
    before.click()
    assert [int(row[1]) for row in query_rows(chromium)] == sorted(base, reverse=True)
    after.click()
    after.click()
    assert query_rows(chromium)[0][0].startswith("question q77")
    names.click()
    assert [row[0] for row in query_rows(chromium)] == sorted(row[0] for row in rows)
    search_for(chromium, "Q11")
    assert len(query_rows(chromium)) == 11  # q11 and q110 to q119
    assert chromium.find_element("id", "count").text == "11 queries"
    search_for(chromium, "no such thing")
    assert query_rows(chromium) == []


def test_one_model_and_a_phone(tmp_path):
    page = page_of(
        {"a/very/long/name/of_a_model_that_goes_on_and_on": [1, 2, 0]}, tmp_path, queries="word " * 40 + "{}"
    )
    with browser.open_browser(width=500, height=800) as phone:
        phone.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
        )
        phone.get(page.as_uri())
        assert phone.get_log("browser") == []
        assert phone.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        assert cells(phone, "#measures table")[1] == ["MRR@1", "0.3333"]
        assert len(query_rows(phone)) == 2
        backgrounds = set()
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            phone.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            backgrounds.add(phone.execute_script("return getComputedStyle(document.body).backgroundColor"))
        assert len(backgrounds) == 2


@pytest.mark.parametrize("count", [10_000, 20_000])
def test_ten_thousand_long_queries_stay_under_5_mb_and_more_are_cut_to_the_most_telling(tmp_path, count):
    ranks = {"base": [1] * count, "tuned": [0] * count}
    page = page_of(ranks, tmp_path, queries="wörd " * 50 + "{}", passage="pässage " * 100 + "{}")
    assert page.stat().st_size < 5_000_000
    data = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])
    assert data["total"] == count
    assert len(data["queries"]) == 10_000 if count == 10_000 else 10_000 < len(data["queries"]) < count
    used = {place for query in data["queries"] for place in [*query[4], *(above[0] for above in query[5])]}
    assert used == set(range(len(data["passages"])))


def test_first_ranks_take_the_best_of_several_answers(tmp_path):
    corpus = Corpus("abcd")
    task = load_task(write_jsonl(tmp_path / "q.jsonl", [{"query": "q", "pos": ["c", "b"]}] * 2), corpus)
    ranking = Ranking(np.array([[0, 2, 1], [0, 3, 3]]), np.array([[3, 2, 1]] * 2, np.float32))
    assert first_ranks(ranking, task, 3).tolist() == [2, 0]
    assert first_ranks(ranking, task, 1).tolist() == [0, 0]


# Judging


@pytest.fixture
def downloads(chromium, tmp_path):
    """Where the browser puts files that a page saves."""
    chromium.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    return tmp_path


def judged_in(folder):
    """The lines of the file that the page saved."""
    path = folder / "judgements.jsonl"
    WebDriverWait(None, 20).until(lambda _: path.exists())
    return path, read_jsonl(path)


def test_what_is_judged_in_the_page_by_mouse_and_by_keys_changes_the_next_evaluation(chromium, tiny_bert, downloads):
    passages = [passage_about(topic) for topic in TOPICS]
    rows = [{"query": f"q{n}q reset the {topic}", "pos": [passages[n]]} for n, topic in enumerate(TOPICS)]
    argv = [
        "--model_name",
        tiny_bert,
        "--index_file_jsonl_path",
        write_jsonl(downloads / "c.jsonl", [{"context": passages}]),
    ]
    argv += ["--query_file_jsonl_path", write_jsonl(downloads / "q.jsonl", rows), "--output_dir", downloads / "out"]
    before = evaluate.main([str(part) for part in argv])
    chromium.get((downloads / "out" / "report.html").as_uri())
    body = chromium.find_element("css selector", "#queries tbody")
    first, second = [row for row in query_rows(chromium) if row[-1] not in ("1", "2", "3")][:2]
    search_for(chromium, first[0])
    body.find_element("css selector", "button[aria-expanded]").click()
    mouse = body.find_elements("css selector", "dd.open")
    assert len(mouse) == 3
    assert not chromium.find_element("id", "judging").is_displayed()
    mouse[0].find_elements("css selector", ".answers button")[0].click()
    assert [b.get_attribute("aria-pressed") for b in mouse[0].find_elements("css selector", ".answers button")] == [
        "true",
        "false",
        "false",
    ]
    for place in (1, 2):
        chromium.execute_script("arguments[0].scrollIntoView({block: 'center'})", mouse[place])
        mouse[place].find_elements("css selector", ".answers button")[place].click()
    # A search closes what was open; what was judged stays.
    search_for(chromium, second[0])
    body.find_element("css selector", "button[aria-expanded]").send_keys(Keys.ENTER, Keys.TAB)
    chromium.switch_to.active_element.send_keys("n")
    chromium.switch_to.active_element.send_keys("y")
    assert chromium.switch_to.active_element.get_attribute("class") == "open"  # the third, not judged yet
    assert chromium.find_element("id", "judged-count").text == "4 judged"
    chromium.switch_to.active_element.send_keys("s")
    assert chromium.switch_to.active_element.get_attribute("id") == "save"
    chromium.switch_to.active_element.send_keys(Keys.ENTER)
    path, lines = judged_in(downloads)
    assert chromium.get_log("browser") == []
    tops = {
        record["query"]: [place["text"] for place in record["models"][str(tiny_bert)]["top"]]
        for record in read_jsonl(downloads / "out" / "per_query.jsonl")
    }
    assert lines == [
        {"query": first[0], "passage": tops[first[0]][0], "relevant": True},
        {"query": first[0], "passage": tops[first[0]][1], "relevant": False},
        {"query": second[0], "passage": tops[second[0]][0], "relevant": False},
        {"query": second[0], "passage": tops[second[0]][1], "relevant": True},
    ]
    after = evaluate.main([*(str(part) for part in argv), "--judgements", str(path)])
    ranks = {row[0]: int(row[-1]) for row in (first, second)}
    gained = (1 - 1 / ranks[first[0]]) + (1 / 2 - 1 / ranks[second[0]])
    assert after["MRR@10"] == pytest.approx(before["MRR@10"] + gained / len(rows), abs=1e-12)
    chromium.get((downloads / "out" / "report.html").as_uri())
    choose(chromium, "all")
    search_for(chromium, second[0])
    chromium.find_element("css selector", "#queries tbody button[aria-expanded]").click()
    assert "judged before: does not answer" in chromium.find_element("id", "queries").text
    assert chromium.find_elements("css selector", "dd.open") == []
    assert "Judged@10" in chromium.find_element("id", "judged").text


def test_leaving_the_page_with_judgements_that_are_not_saved_asks_first(chromium, tmp_path):
    page = page_of({"base": [3, 4]}, tmp_path)
    chromium.get(page.as_uri())
    chromium.find_element("css selector", "#queries tbody button").click()
    chromium.find_element("css selector", "dd.open .answers button").click()
    script = "const e = new Event('beforeunload', {cancelable: true}); return !dispatchEvent(e)"
    assert chromium.execute_script(script)
    chromium.find_element("id", "save").click()
    assert not chromium.execute_script(script)


def test_keys_go_on_to_the_next_query_that_has_anything_to_judge(chromium, tmp_path):
    chromium.get(page_of({"base": [2, 1, 2]}, tmp_path).as_uri())
    choose(chromium, "all")
    chromium.find_element("css selector", "#queries tbody button").send_keys(Keys.ENTER, Keys.TAB, "y")
    assert (
        chromium.execute_script("return document.activeElement.closest('tr').previousSibling.cells[0].innerText")
        == "question 2"
    )
    chromium.switch_to.active_element.send_keys("n")
    assert chromium.find_element("id", "judged-count").text == "2 judged"
    chromium.find_element("id", "save").click()


def test_only_whole_texts_can_be_judged(chromium, tmp_path, monkeypatch):
    monkeypatch.setattr(query_table, "_WHOLE_BYTES", 3000)
    page = page_of(
        {"base": [2] * 12}, tmp_path, queries="question {} " + "word " * 60, passage="passage {} " + "x" * 500
    )
    chromium.get(page.as_uri())
    for button in chromium.find_elements("css selector", "#queries tbody button"):
        button.click()
    whole = len(chromium.find_elements("css selector", "dd.open"))
    assert 0 < whole < 12
    assert chromium.find_element("id", "queries").text.count("too much text to judge it here") == 12 - whole
