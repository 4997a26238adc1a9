"""The texts of ../shared/data/debian that the benchmarks share."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "debian"


def records(name: str) -> Iterator[dict]:
    """The records of train, test, candidates or pool."""
    with gzip.open(FOLDER / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def passages(count: int) -> list[str]:
    """`count` passages, evenly spread over the pool."""
    texts = [record["text"] for record in records("pool")]
    return [texts[number * len(texts) // count] for number in range(count)]
