"""Hard negatives: ranking candidates, choosing among them, and the audit."""
