"""A whole mining job, process start included: this suite, sentence-transformers and FlagEmbedding, with their defaults.

    python benchmarks/mining_job.py
    PYTHONPATH=/folder/with/FlagEmbedding python benchmarks/mining_job.py --engines ours flagembedding

500 queries, a pool of 4,000 passages, 15 negatives from the ranks 10-210, on the rows and passages of make_debian.py.
sentence-transformers runs its mine_hard_negatives. FlagEmbedding runs the steps of its hn_mine script: its model,
encode_queries, encode_corpus, a flat faiss index, sampling. It does not read the checkpoint's pooling and length (256),
so they are given to it.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import REPOSITORY, new_parser, passages, records

ENGINES = {
    "ours": """
import sys
sys.path.insert(0, {repository!r})
import mine_hard_neg
mine_hard_neg.main(["--model_name_or_path", {model!r}, "--input_file", {rows!r}, "--candidate_pool", {pool!r},
                    "--output_file", {output!r}] + {flags!r})
""",
    "sentence-transformers": """
import json
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives
rows = [json.loads(line) for line in open({rows!r})]
pool = [json.loads(line)["text"] for line in open({pool!r})]
pairs = Dataset.from_list([{{"query": row["query"], "answer": text}} for row in rows for text in row["pos"]])
mined = mine_hard_negatives(pairs, SentenceTransformer({model!r}, device="cpu"), corpus=pool, range_min=10,
    range_max=210, num_negatives=15, sampling_strategy="random", output_format="n-tuple", use_faiss=True)
mined.to_json({output!r})
""",
    "flagembedding": """
import json, random
import faiss, numpy as np
from FlagEmbedding import FlagModel
rows = [json.loads(line) for line in open({rows!r})]
pool = list(dict.fromkeys(json.loads(line)["text"] for line in open({pool!r})))
model = FlagModel({model!r}, pooling_method="mean", devices="cpu", passage_max_length=256)
passages = np.asarray(model.encode_corpus(pool), dtype=np.float32)
queries = np.asarray(model.encode_queries([row["query"] for row in rows]), dtype=np.float32)
index = faiss.IndexFlatIP(passages.shape[1])
index.add(passages)
for row, ranking in zip(rows, index.search(queries, 210)[1]):
    texts = [pool[place] for place in ranking[10:210] if pool[place] not in row["pos"] and pool[place] != row["query"]]
    row["neg"] = random.sample(texts, min(15, len(texts)))
open({output!r}, "w").writelines(json.dumps(row) + "\\n" for row in rows)
""",
}


def main() -> None:
    parser = new_parser(__doc__, model=True, data=True)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--pool", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["ours", "sentence-transformers"])
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of mine_hard_neg.py")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {engine: [] for engine in args.engines}
    with tempfile.TemporaryDirectory() as folder:
        rows, pool = Path(folder) / "rows.jsonl", Path(folder) / "pool.jsonl"
        chosen = random.Random(0).sample(list(records(args.data, "train")), args.queries)
        texts = [text for row in chosen for text in row["pos"]]
        texts += [text for text in passages(args.data, args.pool) if text not in set(texts)][: args.pool - len(texts)]
        rows.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        pool.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        for _ in range(args.rounds):
            for engine in args.engines:
                program = ENGINES[engine].format(
                    repository=str(REPOSITORY),
                    model=args.model,
                    rows=str(rows),
                    pool=str(pool),
                    output=f"{folder}/{engine}.jsonl",
                    flags=args.flags,
                )
                began = time.perf_counter()
                subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
                seconds[engine].append(time.perf_counter() - began)
    fastest = statistics.median(seconds[args.engines[0]])
    for engine, measured in seconds.items():
        median = statistics.median(measured)
        print(f"{engine:24} {median:6.1f} s  ({min(measured):.1f} - {max(measured):.1f})  {median / fastest:.2f}x")


if __name__ == "__main__":
    main()
