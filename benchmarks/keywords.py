"""Time and peak memory of ranking by words (bm25) among many passages.

    python benchmarks/keywords.py --passages 1000000 --queries 1000

Passages are those of make_debian.py, each repeated with a number behind it. evaluate.py runs whole, in a process of its
own, with bm25 alone.
"""

import json
import tempfile
from pathlib import Path

from common import new_parser, peak_memory, records


def main() -> None:
    parser = new_parser(__doc__, data=True)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    args = parser.parse_args()
    texts = [record["text"] for record in records(args.data, "pool")]
    rows = [row for _, row in zip(range(args.queries), records(args.data, "test"))]
    with tempfile.TemporaryDirectory() as folder:
        corpus, queries = Path(folder) / "corpus.jsonl", Path(folder) / "queries.jsonl"
        with corpus.open("w") as file:
            for number in range(args.passages):
                repeat = number // len(texts)
                text = texts[number % len(texts)] + (f" {repeat}" if repeat else "")
                file.write(json.dumps({"text": text}) + "\n")
        queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ["--model_name", "bm25", "--index_file_jsonl_path", str(corpus)]
        peak, seconds = peak_memory("evaluate", [*flags, "--query_file_jsonl_path", str(queries)])
    print(f"{args.passages:,} passages, {len(rows):,} queries: {seconds:.0f} s, {peak} MiB")


if __name__ == "__main__":
    main()
