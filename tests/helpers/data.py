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


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
