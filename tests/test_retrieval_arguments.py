"""The flags of encoding and the value that they become."""

from dataclasses import FrozenInstanceError, asdict

import pytest
from helpers.running import encoding_arguments

from embedding_finetune.parser import new_parser
from embedding_finetune.retrieval.arguments import EncodingOptions, add_encoding_arguments


def test_without_flags_the_options_are_their_own_defaults():
    assert encoding_arguments() == EncodingOptions()


def test_every_flag_sets_the_option_of_its_name():
    flags = "--sentence_pooling_method mean --normalized False --query_instruction_for_retrieval q "
    flags += "--passage_instruction_for_retrieval p --query_max_len 7 --passage_max_len 9 --truncate_dim 3 "
    flags += "--dtype float16 --tokens_per_batch 11 --torch_compile --embeddings_dir e --use_gpu_for_searching "
    flags += "--trust_remote_code True --cache_dir c"
    assert asdict(encoding_arguments(*flags.split())) == {
        "sentence_pooling_method": "mean",
        "normalized": False,
        "query_instruction_for_retrieval": "q",
        "passage_instruction_for_retrieval": "p",
        "query_max_len": 7,
        "passage_max_len": 9,
        "truncate_dim": 3,
        "dtype": "float16",
        "tokens_per_batch": 11,
        "torch_compile": True,
        "embeddings_dir": "e",
        "use_gpu_for_searching": True,
        "trust_remote_code": True,
        "cache_dir": "c",
    }


def test_the_dimensions_of_sizes_are_a_list_that_repeating_the_flag_extends():
    parser = new_parser("")
    add_encoding_arguments(parser, several_dimensions=True)
    assert parser.parse_args([]).truncate_dim is None
    assert parser.parse_args("--truncate_dim 8 --truncate_dim 3 8".split()).truncate_dim == [8, 3, 8]


def test_options_do_not_change():
    with pytest.raises(FrozenInstanceError):
        EncodingOptions().dtype = "float16"
