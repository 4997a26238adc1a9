"""Rows to batches to a tuned model."""
