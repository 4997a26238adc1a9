"""Short runs of finetune.py on ten rows."""

from pathlib import Path

import numpy as np

from helpers.data import TOPICS, passage_about, write_jsonl
from helpers.running import encoder_for

TEXTS = ["how do i reset the pump?", "Call the alarm desk.", "red green blue " * 30]


def write_rows(folder: Path) -> Path:
    """Ten rows with two negatives each."""
    texts = [passage_about(topic) for topic in TOPICS]
    return write_jsonl(
        folder / "rows.jsonl",
        [
            {"query": f"how do i reset the {topic}?", "pos": [texts[n]], "neg": [texts[n - 1], texts[n - 2]]}
            for n, topic in enumerate(TOPICS)
        ],
    )


def train(model, rows, output, *flags, steps=4):
    import finetune

    argv = ["--model_name_or_path", model, "--train_data", rows, "--output_dir", output, "--max_steps", steps]
    argv += ["--per_device_train_batch_size", 5, "--train_group_size", 3, "--learning_rate", 1e-2, "--temperature", 0.1]
    finetune.main([str(part) for part in (*argv, "--save_steps", 2, *flags)])
    return output


def embeddings(folder, *flags) -> np.ndarray:
    """Of TEXTS as queries, in float32: (3, H)."""
    return encoder_for(folder, "--dtype", "float32", *flags).encode_queries(TEXTS)
