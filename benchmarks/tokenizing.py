"""Microseconds per text of tokenizing: all of it, and what holds Python's lock, which the main thread needs meanwhile.

    python benchmarks/tokenizing.py

`ours` is TextKind.tokenize, `transformers` a call of its tokenizer, `Rust alone` a call of the Rust tokenizer, whose
results are dropped. The Rust tokenizer works in threads of its own: the CPU time of the calling thread is what holds
the lock. The best of --rounds counts.
"""

import os
import time
from collections.abc import Callable

from common import new_parser, passages


def main() -> None:
    parser = new_parser(__doc__, model=True, data=True)
    parser.add_argument("--texts", type=int, default=8192)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"

    from transformers import AutoTokenizer

    from embedding_finetune.model.tokens import TextKind

    texts = passages(args.data, args.texts)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    kind = TextKind("passage", "", args.max_length, lower_case=False, include_prompt=True)
    runs: dict[str, Callable[[], object]] = {
        "transformers": lambda: tokenizer(texts, truncation=True, max_length=args.max_length),
        "ours": lambda: kind.tokenize(tokenizer, texts),
        "Rust alone": lambda: tokenizer.backend_tokenizer.encode_batch_fast(texts),
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            began, used = time.perf_counter(), time.thread_time()
            run()
            measured[name].append((time.perf_counter() - began, time.thread_time() - used))
    print(f"{'us per text':14} {'all':>8} {'with the lock':>14}")
    for name, seconds in measured.items():
        whole, locked = (min(column) / len(texts) * 1e6 for column in zip(*seconds))
        print(f"{name:14} {whole:8.1f} {locked:14.1f}")


if __name__ == "__main__":
    main()
