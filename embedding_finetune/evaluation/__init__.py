"""Rankings to measures, and measures to what people read."""
