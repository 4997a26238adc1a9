"""From texts to embeddings, and from embeddings to rankings."""
