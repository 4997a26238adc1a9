"""The report's section about thresholds, in Chromium."""

import json

import pytest
from helpers import browser
from helpers.data import write_evaluation

import evaluate
from embedding_finetune.evaluation.threshold_page import threshold_section


@pytest.fixture(scope="module")
def chromium():
    with browser.open_browser() as driver:
        yield driver


@pytest.fixture
def data(tmp_path):
    """Ten questions with an answer, and three without."""
    return write_evaluation(tmp_path, ("red light", "who is it", "my badge"))


def test_the_section_of_the_report_shows_the_numbers_of_metrics_json(chromium, tiny_bert, other_bert, data, tmp_path):
    output = tmp_path / "out"
    names = ["--model_name", str(tiny_bert), str(other_bert)]
    evaluate.main([*names, *data, "--thresholds", "--output_dir", str(output)])
    thresholds = json.loads((output / "metrics.json").read_text())["thresholds"]
    chromium.get((output / "report.html").as_uri())
    assert chromium.get_log("browser") == []
    section = chromium.find_element("id", "thresholds")
    tables = section.find_elements("tag name", "table")
    for name, table in zip(thresholds["models"], tables, strict=True):
        head, *rows = [[cell.text for cell in row.find_elements("css selector", "th, td")] for row in
                       table.find_elements("tag name", "tr")]  # fmt: skip
        assert head[0] == f"{name}: first passage right"
        assert head[-2:] == ["refused", "range"]
        for row, target in zip(rows, thresholds["models"][name]["targets"], strict=True):
            assert row[0] == f"{target['precision']:.0%}"
            assert row[1] == ("never" if target["threshold"] is None else f"{target['threshold']:.4f}")
            assert row[-2] == f"{target['refused']:.1%}"
            assert row[-1] == f"{target['refused_low']:.1%} .. {target['refused_high']:.1%}"
    told = [line.text for line in section.find_elements("css selector", "p.soft")]
    for line, found in zip(told, thresholds["models"].values(), strict=True):
        assert f"{found['area']:.1%} of all pairs (area under the ROC curve; 95% interval" in line
        assert f"{found['area_low']:.1%} .. {found['area_high']:.1%})." in line
    dots = section.find_elements("tag name", "circle")
    assert len(dots) == sum(len(found["curve"]) for found in thresholds["models"].values())
    colour = "return getComputedStyle(document.querySelector('#thresholds polyline')).stroke"
    light = chromium.execute_script(colour)
    chromium.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    assert chromium.execute_script(colour) != light


def test_without_thresholds_there_is_no_section_and_names_are_escaped():
    assert threshold_section(None, []) == ""
    point = {"threshold": 0.5, "precision": 0.9, "low": 0.4, "high": 1.0, "answered": 0.5}
    target = {"precision": 0.9, "threshold": None, "threshold_low": 0.7, "threshold_high": None, "answered": 0.0}
    target |= {"answered_low": 0.0, "answered_high": 0.1, "on_new_questions": None, "refused": None}
    found = {"curve": [point], "targets": [target], "area": None}
    html = threshold_section({"models": {"<b>&": found}, "moved": None}, ["other", "<b>&"])
    assert "<b>&" not in html
    assert "&lt;b&gt;&amp;: first passage right" in html
    assert 'polyline class="m1"' in html
    assert ">40%<" not in html  # the axis begins at the lowest part of a band, and has round marks
    assert ">never<" in html
    assert ">0.7000 .. never<" in html
