"""Texts to embeddings, embeddings to rankings."""
