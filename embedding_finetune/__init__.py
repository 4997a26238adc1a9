"""Finetune text-embedding models for retrieval on your own question/passage pairs.

The three runs live in the scripts beside this package: mine_hard_neg.py, finetune.py and
evaluate.py. CONTRIBUTING.md shows how data flows through the modules.
"""

__version__ = "0.1.0"
