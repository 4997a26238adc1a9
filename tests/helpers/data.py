"""Where things are, and a small made-up data set."""

import json
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent

DEMO_MODEL = REPOSITORY / ".demo" / "model"

TOPICS = ("pump", "valve", "filter", "motor", "gate", "panel", "sensor", "alarm", "badge", "desk")


def passage_about(topic: str) -> str:
    number = TOPICS.index(topic)
    return f"To reset the {topic} press the red handle and hold it for {number} seconds. Call the {topic} desk."


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def write_beir(folder: Path, documents: dict, queries: dict, **splits: dict) -> Path:
    """A BEIR folder: documents id -> text or (title, text), queries id -> text, splits query -> document -> score."""
    (folder / "qrels").mkdir(parents=True)
    pairs = {name: text if isinstance(text, tuple) else ("", text) for name, text in documents.items()}
    records = [{"_id": name, "title": title, "text": text} for name, (title, text) in pairs.items()]
    write_jsonl(folder / "corpus.jsonl", records)
    write_jsonl(folder / "queries.jsonl", [{"_id": name, "text": text} for name, text in queries.items()])
    for split, judgements in splits.items():
        lines = [f"{query}\t{doc}\t{score}" for query, judged in judgements.items() for doc, score in judged.items()]
        text = "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n"
        (folder / "qrels" / f"{split}.tsv").write_text(text, encoding="utf-8")
    return folder


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_evaluation(folder: Path, unanswered=()) -> list[str]:
    """The flags of evaluate.py for ten passages with a question about each; from row 4 on, some without an answer."""
    corpus = write_jsonl(folder / "corpus.jsonl", [{"text": passage_about(topic)} for topic in TOPICS])
    rows = [{"query": f"how do i reset the {topic}", "pos": [passage_about(topic)]} for topic in TOPICS]
    rows[4:4] = [{"query": query, "pos": []} for query in unanswered]
    queries = write_jsonl(folder / "q.jsonl", rows)
    return ["--index_file_jsonl_path", str(corpus), "--query_file_jsonl_path", str(queries)]


def padded_ids(texts):
    """The token ids (D, T) of padded texts, as sub_batches.Texts has them."""
    return texts["token_ids"][texts["positions"]]
