"""The names of the pooling methods. No heavy imports: flags need the names."""

from typing import Literal, get_args

PoolingMethod = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
POOLING_METHODS: tuple[PoolingMethod, ...] = get_args(PoolingMethod)
"""`cls`: the first token's state; `max`: the largest value of each dimension; `mean`: the mean over tokens;
`mean_sqrt_len_tokens`: their sum divided by the root of their number; `weightedmean`: the mean in which the n-th token
counts n times (SGPT, arXiv:2202.08904); `lasttoken`: the last token's state. The order is that in which
sentence-transformers concatenates several of them, which are joined by a `+` here."""
