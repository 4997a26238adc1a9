"""Encoders, searches and processes as tests use them, and measures by their definition."""

import time

import numpy as np


def encoding_arguments(*flags: str):
    """What load_encoder and load_reranker take, by the flags of a command line."""
    import argparse

    from embedding_finetune.retrieval.arguments import EncodingOptions, add_encoding_arguments

    parser = argparse.ArgumentParser()
    add_encoding_arguments(parser)
    return EncodingOptions(**vars(parser.parse_args(flags)))


def search(queries, passages, top_k, *, ties="first"):
    """Scores and positions of the top k of one array of passages."""
    from embedding_finetune.retrieval.top_k import TopK

    top = TopK(queries, top_k, ties=ties)
    top.add(0, passages)
    positions, scores = top.ranking()
    return scores, positions


def encoder_for(folder, *flags):
    """The encoder that the flags of mine_hard_neg.py and evaluate.py give."""
    from embedding_finetune.retrieval.encoder import load_encoder

    return load_encoder(str(folder), encoding_arguments(*flags), flag="--model")


def embed_passages(encoder, texts):
    """(N, H)."""
    return np.concatenate([block for _, block in encoder.encode_passages(texts)])


def argv_of(**flags):
    """A command line of these flags."""
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def evaluation(model, candidates, pairs):
    """The command line of evaluate.py."""
    return argv_of(model_name=model, index_file_jsonl_path=candidates, query_file_jsonl_path=pairs)


def mean_reciprocal_rank(queries, passages, answers, *, cutoff=10):
    """By its definition, in loops; answers: the row of each query's one right passage."""
    total = 0.0
    for query, answer in zip(queries, answers, strict=True):
        scores = [float(query @ passage) for passage in passages]
        rank = 1 + sum(score > scores[answer] for score in scores)
        total += 1 / rank if rank <= cutoff else 0
    return total / len(queries)


def wait_until(condition, process, *, seconds=300):
    """Wait for something that a running process does, as long as it runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the process ended with status {process.returncode}"
        assert time.monotonic() < end, f"nothing happened in {seconds} s"
        time.sleep(0.02)
