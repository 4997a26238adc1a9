"""The distinct texts that can be retrieved, each known by its position."""

from collections.abc import Iterable

from embedding_finetune.jsonl import canonical


class Corpus:
    """Texts in first-seen order; texts that are equal in canonical form are one.

    `texts[p]` is the text at position p as it was first written; `duplicates` counts the others.
    """

    def __init__(self, texts: Iterable[str]):
        self.texts: list[str] = []
        self.duplicates = 0
        self._positions: dict[str, int] = {}
        for text in texts:
            if self._positions.setdefault(canonical(text), len(self.texts)) == len(self.texts):
                self.texts.append(text)
            else:
                self.duplicates += 1

    def __len__(self) -> int:
        return len(self.texts)

    def position(self, text: str) -> int | None:
        """Where `text` stands, or None when it is not in the corpus."""
        return self._positions.get(canonical(text))
