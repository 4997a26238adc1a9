"""The names of the pooling methods. No heavy imports: flags need the names."""

from typing import Literal, get_args

PoolingMethod = Literal["cls", "mean", "lasttoken"]
POOLING_METHODS: tuple[PoolingMethod, ...] = get_args(PoolingMethod)
"""`cls`: the first token's state; `mean`: the mean over tokens; `lasttoken`: the last token's state."""
