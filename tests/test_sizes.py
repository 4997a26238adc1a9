"""Smaller indices: each ranking beside a plain one in numpy."""

import json

import numpy as np
import pytest
from helpers.data import write_evaluation
from hypothesis import given
from hypothesis import strategies as st

import evaluate
from embedding_finetune.evaluation import sizes
from embedding_finetune.evaluation.sizes import Embedded
from embedding_finetune.retrieval.faiss_search import import_faiss
from embedding_finetune.retrieval.tower import Tower


def embedded(count_queries, count_passages, dimensions=64, seed=0, levels=None):
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((count, dimensions)).astype(np.float32) for count in (count_queries, count_passages)]
    if levels:  # many equal distances
        arrays = [np.sign(array) * rng.integers(1, levels, array.shape).astype(np.float32) for array in arrays]
    return Embedded(*arrays, False)


def plain_ranking(scores):
    """Positions from the best to the worst; of equal scores the passage that comes last."""
    return np.lexsort((np.broadcast_to(-np.arange(scores.shape[1]), scores.shape), -scores), axis=1)


@given(st.integers(1, 4), st.integers(1, 60), st.integers(1, 20), st.sampled_from([8, 12, 64]), st.integers(0, 99))
def test_binary_is_hamming_distance_in_numpy_with_ties_by_position(queries, passages, top_k, dimensions, seed):
    part, top_k = embedded(queries, passages, dimensions, seed, levels=2), min(top_k, passages)
    distances = ((part.queries[:, None] > 0) != (part.passages[None] > 0)).sum(axis=2)
    found = sizes._by_hamming_distance(import_faiss(), part, top_k)
    assert np.array_equal(found.positions, plain_ranking(-distances)[:, :top_k])
    assert np.array_equal(-found.scores, np.take_along_axis(distances, found.positions, axis=1))


def test_rescored_candidates_are_ranked_by_the_querys_floats_and_the_passages_signs():
    part = embedded(5, 300)
    candidates = sizes._by_hamming_distance(import_faiss(), part, 40).positions
    found = sizes._rescored(part, candidates, 10)
    signs = np.where(part.passages > 0, 1.0, -1.0)
    for row in range(5):
        scores = {position: part.queries[row].astype(np.float64) @ signs[position] for position in candidates[row]}
        assert found.positions[row].tolist() == sorted(scores, key=lambda p: (-np.float32(scores[p]), -p))[:10]


@pytest.mark.parametrize(("kind", "bits", "agree"), [("QT_8bit", 8, 0.98), ("QT_4bit", 4, 0.7)])
def test_quantised_rankings_are_those_of_rounded_values(kind, bits, agree):
    part, faiss = embedded(50, 400), import_faiss()
    exact = plain_ranking(part.queries @ part.passages.T)[:, :10]
    found = sizes._quantised(faiss, part, getattr(faiss.ScalarQuantizer, kind), 10).positions
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact.tolist(), found.tolist())]) > agree
    low, high = part.passages.min(axis=0), part.passages.max(axis=0)
    steps = 2**bits - 1
    rounded = low + (high - low) * (np.floor((part.passages - low) / (high - low) * steps).clip(0, steps) + 0.5) / steps
    ours = plain_ranking(part.queries @ rounded.T)[:, :10]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ours.tolist(), found.tolist())]) > 0.97


@pytest.fixture
def data(tmp_path):
    return write_evaluation(tmp_path)


@pytest.mark.parametrize("normalized", ["True", "False"])
def test_evaluate_measures_each_size_and_float32_is_the_model_itself(tiny_bert, data, tmp_path, capsys, normalized):
    flags = ["--dtype", "float32", "--normalized", normalized, "--cutoffs", "1", "3", "--measures", "MRR", "Recall"]
    names, output = ["--model_name", "bm25", str(tiny_bert)], tmp_path / "out"
    metrics = evaluate.main([*names, *data, *flags, "--sizes", "--output_dir", str(output)])[str(tiny_bert)]
    out = capsys.readouterr().out
    assert f"{tiny_bert}: dimensions" in out
    document = json.loads((output / "metrics.json").read_text())
    assert list(document["sizes"]) == [str(tiny_bert)]
    records = document["sizes"][str(tiny_bert)]
    shown = [(record["dimensions"], record["precision"], record["bytes"]) for record in records]
    assert shown == [(32, "float32", 128), (32, "int8", 32), (32, "int4", 16), (32, "binary", 4),
                     (32, "binary, rescored", 4)]  # fmt: skip
    assert records[0]["metrics"] == {name: metrics[name] for name in ("MRR@3", "Recall@3")}
    assert records[0]["difference"]["mean"] == 0
    for record in records:
        expected = record["metrics"]["MRR@3"] - metrics["MRR@3"]
        assert record["difference"]["mean"] == pytest.approx(expected, abs=1e-9)
    page = (output / "report.html").read_text()
    assert '<section id="sizes">' in page


def test_fewer_dimensions_are_those_of_truncate_dim():
    part = embedded(3, 40, dimensions=256)._replace(unit=True)
    halves = list(sizes._parts(part, []))
    assert [half.queries.shape[1] for half in halves] == [256, 128, 64, 32]
    for half in halves:
        kept = half.queries.shape[1]
        expected = part.passages[:, :kept] / np.linalg.norm(part.passages[:, :kept], axis=1, keepdims=True)
        assert np.allclose(half.passages, expected)
    raw = list(sizes._parts(part._replace(unit=False), []))
    assert np.array_equal(raw[1].passages, part.passages[:, :128])
    assert [cut.passages.shape[1] for cut in sizes._parts(part, [200, 5])] == [256, 200, 5]


def test_a_passage_takes_whole_bytes():
    [whole, cut] = sizes._parts(embedded(3, 40, dimensions=20), [5])
    shown = [[(precision, size) for precision, size, _ in sizes._rankings(part, 4)] for part in (whole, cut)]
    assert shown[0] == [("float32", 80), ("int8", 20), ("int4", 10), ("binary", 3), ("binary, rescored", 3)]
    assert shown[1] == [("float32", 20), ("int8", 5), ("int4", 3), ("binary", 1), ("binary, rescored", 1)]


def test_the_values_of_truncate_dim_are_the_dimensions_and_each_gives_what_it_gives_alone(tiny_bert, data, tmp_path):
    output = tmp_path / "out"
    flags = ["--model_name", str(tiny_bert), *data, "--dtype", "float32"]
    several = ["--sizes", "--truncate_dim", "6", "24", "--truncate_dim", "13", "6", "--output_dir", str(output)]
    metrics = evaluate.main([*flags, *several])
    document = json.loads((output / "metrics.json").read_text())
    records = document["sizes"][str(tiny_bert)]
    assert [record["dimensions"] for record in records[::5]] == [24, 13, 6]
    measured = {record["dimensions"]: record["metrics"] for record in records if record["precision"] == "float32"}
    alone = {size: evaluate.main([*flags, "--truncate_dim", str(size)]) for size in measured}
    assert alone[24] == metrics
    assert measured == {size: {name: found[name] for name in ("MRR@10", "Hit@10")} for size, found in alone.items()}
    assert len({found["MRR@10"] for found in alone.values()}) == 3  # else nothing would tell them apart
    for record in records:
        expected = record["metrics"]["MRR@10"] - metrics["MRR@10"]
        assert record["difference"]["mean"] == pytest.approx(expected, abs=1e-9)


def test_one_value_of_truncate_dim_is_halved(tiny_bert, data, monkeypatch):
    monkeypatch.setattr(sizes, "_FEWEST_DIMENSIONS", 4)
    cut = sizes._parts
    seen = []
    monkeypatch.setattr(sizes, "_parts", lambda *args: seen.extend(cut(*args)) or seen)
    evaluate.main(["--model_name", str(tiny_bert), *data, "--sizes", "--truncate_dim", "16", "16"])
    assert [part.queries.shape[1] for part in seen] == [16, 8, 4]


def test_dimensions_that_the_model_lacks_are_told_before_anything_is_encoded(tiny_bert, data, monkeypatch, capsys):
    monkeypatch.setattr(Tower, "_encode", lambda *_: pytest.fail("a text was encoded"))
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--model_name", str(tiny_bert), *data, "--sizes", "--truncate_dim", "8", "33"])
    assert exit.value.code == 2
    assert "--truncate_dim 33: the model's embeddings have 32 dimensions" in capsys.readouterr().err


def test_bm25_alone_has_no_sizes(data, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--model_name", "bm25", *data, "--sizes"])
    assert exit.value.code == 2
    assert "--sizes: bm25 and fusions have no embeddings; name a model by itself" in capsys.readouterr().err
