"""Make a retrieval task: from Debian's package descriptions, or from question/passage pairs of your own.

    sudo apt-get update -o Acquire::Languages=en
    python benchmarks/make_debian.py
    python benchmarks/make_debian.py --rows example.jsonl --test_queries 100 --output_dir benchmarks/data/example

The query is a package's one-line synopsis, its positive the long description. Descriptions of 150 characters or
less are left out. So is a package with the synopsis of an earlier one, or with the first 150 characters of its
description. --rows reads `{"query": str, "pos": [str, ...]}` instead, one row a line, and leaves none out.

Rows are sorted by a hash of the query. The first ones are for testing. Training rows that share a query or a positive
with them are left out. Four files are written:

    train.jsonl.gz       {"query": str, "pos": [str, ...]}
    test.jsonl.gz        the same
    candidates.jsonl.gz  {"context": [str]}, every passage of both
    pool.jsonl.gz        {"text": str}, the same passages
"""

import argparse
import hashlib
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from common import DATA, new_parser

from embedding_finetune.command_line import UserError, command
from embedding_finetune.data import jsonl
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.records import read_training_rows
from embedding_finetune.data.texts import canonical
from embedding_finetune.parser import positive_int

OPENING = 150
"""Characters. Shorter descriptions say too little, and two that begin with the same characters count as one."""
APT_HELPER = "/usr/lib/apt/apt-helper"
ENGLISH = ("-o", "Acquire::Languages=en")
"""Containers are often configured to download no descriptions."""
UPDATE = f"sudo apt-get update {' '.join(ENGLISH)}"


@command
def main() -> None:
    args = parse_arguments()
    rows = read_rows(args.rows) if args.rows else list(distinct(debian_rows()))
    train, test = split(rows, args.test_queries)
    passages = list(dict.fromkeys(text for row in test + train for text in row["pos"]))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    jsonl.write(args.output_dir / "train.jsonl.gz", train)
    jsonl.write(args.output_dir / "test.jsonl.gz", test)
    jsonl.write(args.output_dir / "candidates.jsonl.gz", ({"context": [text]} for text in passages))
    jsonl.write(args.output_dir / "pool.jsonl.gz", ({"text": text} for text in passages))
    print(f"{len(train)} training rows, {len(test)} test queries, {len(passages)} passages: {args.output_dir}")


def parse_arguments() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSON Lines to use instead of Debian's descriptions")
    parser.add_argument("--test_queries", type=positive_int, default=2000, metavar="N", help="(default: 2000)")
    parser.add_argument("--output_dir", type=Path, default=DATA, help="(default: benchmarks/data/debian)")
    return parser.parse_args()


def read_rows(path: Path) -> list[Record]:
    """The rows of a JSON Lines file, with their query and positives only."""
    return [{"query": row["query"], "pos": row["pos"]} for row in read_training_rows(path)]


def debian_rows() -> Iterator[Record]:
    """A row for each description in the lists that apt-get update downloaded, in their order."""
    if shutil.which("apt-get") is None:
        raise UserError("there is no apt-get here: give --rows, a JSON Lines file of your own")
    targets = [
        "apt-get",
        "indextargets",
        *ENGLISH,
        "--format",
        "$(FILENAME)",
        "Created-By: Translations",
        "Language: en",
    ]
    lists = [name for name in _output(targets).splitlines() if Path(name).exists()]
    if not lists:
        raise UserError(f"apt has no list of English descriptions: run `{UPDATE}` once, or give --rows")
    for name in sorted(lists):
        for paragraph in _output([APT_HELPER, "cat-file", name]).split("\n\n"):
            yield from parse_description(paragraph)


def parse_description(paragraph: str) -> Iterator[Record]:
    """The row of one paragraph of a Translation-en list; none if the description is too short.

    A line with only a dot separates paragraphs of the description.
    """
    _, field, description = paragraph.partition("Description-en: ")
    synopsis, *lines = description.splitlines() if field else [""]
    text = " ".join(word for line in lines if line.strip() != "." for word in line.split())
    if synopsis.strip() and len(text) > OPENING:
        yield {"query": synopsis.strip(), "pos": [text]}


def distinct(rows: Iterable[Record]) -> Iterator[Record]:
    """The rows without those that share the query, or the opening of the positive, with an earlier row."""
    seen: set[str] = set()
    for row in rows:
        keys = {canonical(row["query"]), canonical(row["pos"][0])[:OPENING]}
        if seen.isdisjoint(keys):
            seen |= keys
            yield row


def split(rows: list[Record], test_queries: int) -> tuple[list[Record], list[Record]]:
    """Training rows and test rows that share no text, both sorted by a hash of their queries.

    Raises UserError if no training row would be left.
    """
    rows = sorted(rows, key=lambda row: hashlib.sha256(canonical(row["query"]).encode()).digest())
    test, rest = rows[:test_queries], rows[test_queries:]
    test_texts = {text for row in test for text in texts_of(row)}
    train = [row for row in rest if test_texts.isdisjoint(texts_of(row))]
    if not train:
        raise UserError(f"--test_queries {test_queries}: of {len(rows)} rows none would be left to train on")
    return train, test


def texts_of(row: Record) -> set[str]:
    """The query and the positives of a row, in canonical form."""
    return {canonical(text) for text in (row["query"], *row["pos"])}


def _output(arguments: list[str]) -> str:
    return subprocess.run(arguments, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout


if __name__ == "__main__":
    main()
