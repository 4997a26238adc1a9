"""Reading and validating rows, and the identity of texts."""
