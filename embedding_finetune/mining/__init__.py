"""Hard negatives: ranked, chosen, accounted for."""
