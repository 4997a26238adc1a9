"""Rows, texts and judgements: read, validated, known by their identity."""
