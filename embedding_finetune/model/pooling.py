"""The names of the ways in which token states become one vector. Nothing heavy is imported: flags need them too."""

from typing import Literal, get_args

PoolingMethod = Literal["cls", "mean", "lasttoken"]
POOLING_METHODS: tuple[PoolingMethod, ...] = get_args(PoolingMethod)
"""`cls`: the first token's state; `mean`: the mean over tokens; `lasttoken`: the last token's state."""
