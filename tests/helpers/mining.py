"""Runs of mine_hard_neg.py on ten rows and twenty texts, and what they have to give by the definition."""

import json
from pathlib import Path

import numpy as np

from helpers.data import TOPICS, passage_about, read_jsonl, write_jsonl

SENTENCES = [f"{start} {passage_about(topic)}" for topic in TOPICS for start in ("Open the hall.", "Close the yard.")]


def similarity(model, queries, passages):
    """Every score, one text at a time, by the definition."""
    import torch
    from torch.nn.functional import normalize

    from embedding_finetune.model.loading import load_backbone

    backbone, tokenizer, _ = load_backbone(str(model), flag="--model")
    backbone.eval()
    with torch.no_grad():
        q, p = (
            torch.cat(
                [
                    normalize(backbone(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(dim=1))
                    for text in texts
                ]
            ).numpy()
            for texts in (queries, passages)
        )
    return q @ p.T


def reference(model, data, *, window, allowed):
    """The negatives that `top` has to give: in order of score, `allowed(score, lowest positive)`, never a positive."""
    rows = read_jsonl(data[0])
    scores = similarity(model, [row["query"] for row in rows], SENTENCES)
    expected = []
    for row, own in zip(rows, scores):
        lowest = min(own[SENTENCES.index(text)] for text in row["pos"])
        ranking = np.argsort(-own, kind="stable")[slice(*window)]
        expected.append([SENTENCES[p] for p in ranking if SENTENCES[p] not in row["pos"] and allowed(own[p], lowest)])
    return expected


def write_data(folder: Path) -> tuple[Path, Path]:
    """Ten rows, each with one positive, the last with two; and a pool of twenty texts."""
    rows = [{"query": f"how do i reset the {topic}?", "pos": [SENTENCES[2 * n]]} for n, topic in enumerate(TOPICS)]
    rows[-1]["pos"].append(SENTENCES[0])
    pool = write_jsonl(folder / "pool.jsonl", [{"text": text} for text in SENTENCES])
    return write_jsonl(folder / "rows.jsonl", rows), pool


def mine(models, data, tmp_path, *flags):
    """The mined rows and the audit."""
    import mine_hard_neg

    rows, pool = data
    models = models if isinstance(models, (list, tuple)) else [models]
    argv = ["--model_name_or_path", *models, "--input_file", rows, "--candidate_pool", pool, "--dtype", "float32"]
    argv += ["--output_file", tmp_path / "out.jsonl", "--report_file", tmp_path / "audit.json", *flags]
    argv += ["--sentence_pooling_method", "mean"]
    mine_hard_neg.main([str(part) for part in argv])
    return read_jsonl(tmp_path / "out.jsonl"), json.loads((tmp_path / "audit.json").read_text())
