"""What training takes on a GPU, computed: activations are counted on a CPU, nothing is measured on a GPU.

    python benchmarks/activations.py
    python benchmarks/activations.py --batches 64x8 --passage_tokens 256 --tokens_per_sub_batch 8192

Counted are the bytes that autograd saves for the backward pass of BERT under bfloat16 autocast, in a model of the real
widths with one layer and with two. Two things are done as a GPU does them: a dropout saves a mask of one byte for each
value, and attention saves nothing of the size of its scores. To activations are added 16 bytes for each parameter, for
weights, gradients and Adam's two states, and 2 for the copy in bfloat16 of the weights that are multiplied with.
Neither padding nor what a backward pass holds for a moment is counted, nor CUDA itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from common import new_parser
from torch import Tensor, nn
from transformers import BertConfig, BertModel

MODELS = {
    "MiniLM, 6 layers": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12},
    "bge-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "bge-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
DROPOUT = 0.1


class Memory(NamedTuple):
    """Bytes that a model takes: for its parameters, and for each token of a batch."""

    parameters: int
    token: int
    token_and_layer: int


class GpuDropout(nn.Dropout):
    """nn.Dropout with the mask that CUDA saves: bool. On a CPU torch saves it in the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """The input with a dropout mask on it; any shape."""
        return torch.native_dropout(input, self.p, True)[0] if self.p else input


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--batches", nargs="+", default=["32x2", "128x2", "128x9"], metavar="QUERIESxGROUP")
    parser.add_argument("--query_tokens", type=int, default=12)
    parser.add_argument("--passage_tokens", type=int, default=98)
    parser.add_argument("--tokens_per_sub_batch", type=int, default=16384)
    args = parser.parse_args()
    batches = [tuple(map(int, text.split("x"))) for text in args.batches]
    tokens = [queries * (args.query_tokens + group * args.passage_tokens) for queries, group in batches]
    print("Bytes of activations for each token and layer, in multiples of the hidden size:\n")
    for name, sizes in MODELS.items():
        per_layer = [memory_of(sizes, dropout).token_and_layer / sizes["hidden_size"] for dropout in (0.0, DROPOUT)]
        print(f"- {name}: {per_layer[0]:.1f} without dropout, {per_layer[1]:.1f} with it")
    heads = [f"{text.replace('x', ' x ')}, {count:,} tokens" for text, count in zip(args.batches, tokens)]
    print(f"\nGB with dropout; in brackets with recomputed sub-batches of {args.tokens_per_sub_batch:,} tokens:\n")
    print("| model | no activations | KB a token |", " | ".join(heads), "|")
    print("|---|---|---|" + "---|" * len(heads))
    for name, sizes in MODELS.items():
        memory = memory_of(sizes, DROPOUT)
        cells = []
        for count in tokens:
            kept, recomputed = count, min(count, args.tokens_per_sub_batch)
            whole, less = (memory.parameters + memory.token * held for held in (kept, recomputed))
            cells.append(f"{whole / 1e9:.1f} ({less / 1e9:.1f})")
        print(f"| {name} | {memory.parameters / 1e9:.1f} | {memory.token / 1e3:.0f} |", " | ".join(cells), "|")


def memory_of(sizes: dict[str, int], dropout: float) -> Memory:
    """What a BERT of these sizes takes, by what one layer more and one text more save."""
    widths = {**sizes, "intermediate_size": 4 * sizes["hidden_size"]}
    one, two = (bytes_per_token({**widths, "num_hidden_layers": layers}, dropout) for layers in (1, 2))
    layers = sizes["num_hidden_layers"]
    with torch.device("meta"):
        model = BertModel(BertConfig(**widths), add_pooling_layer=False)
    multiplied = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    parameters = 16 * sum(parameter.numel() for parameter in model.parameters()) + 2 * multiplied
    return Memory(parameters, one + (layers - 1) * (two - one), two - one)


def bytes_per_token(sizes: dict[str, int], dropout: float, *, length: int = 64) -> int:
    """What each token of a batch adds to the bytes that autograd saves. Weights and their copies are left out so."""
    # Attention's dropout makes torch save the scores on a CPU; CUDA's kernels save the seed of its mask.
    config = BertConfig(**sizes, vocab_size=50, hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0)
    model = BertModel(config, add_pooling_layer=False).train()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, GpuDropout(child.p))

    def forward(texts: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.zeros(texts, length, dtype=torch.int64))

    few, many = (bytes_saved(lambda texts=texts: forward(texts)) for texts in (2, 4))
    return round((many - few) / (2 * length))


def bytes_saved(forward: Callable[[], None]) -> int:
    """The bytes of all distinct storages that autograd saves in a forward pass."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # it is held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


if __name__ == "__main__":
    main()
