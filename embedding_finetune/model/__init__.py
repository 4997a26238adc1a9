"""Checkpoints, the bi-encoder they become, and what makes it fast."""
