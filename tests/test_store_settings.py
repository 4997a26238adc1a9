"""What decides an embedding, and nothing else, is in the key of its store."""

import json

import numpy as np
import pytest
from helpers.data import TOPICS, passage_about
from helpers.running import embed_passages, encoder_for
from helpers.tiny import make_tiny_bert, make_tokenizer
from transformers import AddedToken, ByT5Tokenizer

TEXTS = [f"{passage_about(topic)} {number}" for number in range(3) for topic in TOPICS]


@pytest.mark.parametrize(
    "flags",
    [
        ("--passage_instruction_for_retrieval", "it is "),
        ("--passage_max_len", "9"),
        ("--sentence_pooling_method", "mean"),
        ("--normalized", "False"),
        ("--dtype", "bfloat16"),
    ],
)
def test_another_setting_never_reuses(tiny_bert, tmp_path, encoded, flags):
    common = ("--embeddings_dir", str(tmp_path / "store"))
    embed_passages(encoder_for(tiny_bert, *common, "--dtype", "float32"), TEXTS)
    encoded.clear()
    embed_passages(encoder_for(tiny_bert, *common, "--dtype", "float32", *flags), TEXTS)
    assert encoded == TEXTS


@pytest.mark.parametrize("changed", ["weights", "tokenizer", "architecture"])
def test_a_changed_model_in_the_same_folder_never_reuses(tmp_path, encoded, changed):
    folder, flags = tmp_path / "model", ("--embeddings_dir", str(tmp_path / "store"))
    make_tiny_bert(folder)
    embed_passages(encoder_for(folder, *flags), TEXTS)
    if changed == "architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    else:
        make_tiny_bert(folder, seed=int(changed == "weights"), lower_case=changed != "tokenizer")
    encoded.clear()
    again = embed_passages(encoder_for(folder, *flags), TEXTS)
    assert encoded == TEXTS
    assert np.array_equal(again, embed_passages(encoder_for(folder), TEXTS))


def test_a_copy_of_the_model_under_another_name_reuses(tiny_bert, tmp_path, encoded):
    flags = ("--embeddings_dir", str(tmp_path / "store"))
    embed_passages(encoder_for(tiny_bert, *flags), TEXTS)
    make_tiny_bert(tmp_path / "elsewhere")
    encoded.clear()
    embed_passages(encoder_for(tmp_path / "elsewhere", *flags), TEXTS)
    assert encoded == []


@pytest.mark.parametrize("changed", [{"truncation_side": "left"}, {"split_special_tokens": True}])
def test_what_decides_token_ids_outside_the_tokenizers_own_file_is_in_the_key(tmp_path, changed):
    digests = []
    for settings in ({}, changed):
        model = make_tiny_bert(tmp_path / f"bert{len(digests)}")
        path = model / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        digests.append(encoder_for(model).passages.index_digest)
    assert digests[0] != digests[1]


def test_the_special_tokens_by_which_a_prompt_is_told_from_a_text_are_in_the_key(tmp_path):
    digests = []
    for removed in ((), ("sep_token",)):
        model = make_tiny_bert(tmp_path / f"bert{len(digests)}")
        path = model / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in settings.items() if name not in removed}))
        digests.append(encoder_for(model).passages.index_digest)
    assert digests[0] != digests[1]


def test_of_a_tokenizer_in_python_the_merges_are_in_the_key_and_its_folder_is_not(tmp_path):
    ranked = ["a b", "b c</w>"]  # abc is ab and c by this order, a and bc by the other
    tokens = ["<unk>", *(letter + end for letter in "abc" for end in ("", "@@")), "ab@@", "bc"]
    ids, digests = [], []
    for merges in (ranked, ranked, ranked[::-1]):
        model = make_tiny_bert(tmp_path / f"bert{len(digests)}")
        (model / "tokenizer.json").unlink()
        (model / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        (model / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        settings = {"tokenizer_class": "CTRLTokenizer", "pad_token": "<unk>", "model_max_length": 128}
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
        tower = encoder_for(model).passages
        assert not tower.tokenizer.is_fast
        if not ids:  # as of a model of the hub
            tower.tokenizer.init_kwargs |= {"is_local": False, "local_files_only": True, "tokenizer_file": "elsewhere"}
        ids.append(tower.tokenizer("abc")["input_ids"])
        digests.append(tower.index_digest)
    assert ids[0] == ids[1] != ids[2]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("make", [make_tokenizer, ByT5Tokenizer])  # in Rust, and in Python
def test_what_an_added_token_takes_of_its_surroundings_is_in_the_key(tiny_bert, make):
    digests = []
    for single_word in (True, False):
        tower = encoder_for(tiny_bert).passages
        tower.tokenizer = make()
        tower.tokenizer.add_tokens(AddedToken("re", single_word=single_word))
        digests.append(tower.index_digest)
    assert digests[0] != digests[1]


@pytest.mark.parametrize("base", ["PreTrainedTokenizerFast", "BertTokenizer"])
def test_the_code_that_comes_with_a_tokenizer_is_in_the_key(tmp_path, base):
    digests = []
    for number, sign in enumerate("*+*"):
        model = make_tiny_bert(tmp_path / f"bert{number}")
        path = model / "tokenizer_config.json"
        own = {"auto_map": {"AutoTokenizer": [None, "own_tokens.Own"]}, "tokenizer_class": "Own"}
        path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
        code = f"from transformers import {base}\n\n\nclass Own({base}):\n    scale = 2 {sign} 1\n"
        (model / "own_tokens.py").write_text(code)
        tower = encoder_for(model, "--trust_remote_code", "True").passages
        assert type(tower.tokenizer).__name__ == "Own"
        digests.append(tower.index_digest)
    assert digests[0] == digests[2] != digests[1]


def test_the_code_that_comes_with_a_model_is_in_the_key(tmp_path):
    digests = []
    for number, sign in enumerate("*+*"):
        model = make_tiny_bert(tmp_path / f"bert{number}")
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModel": "modeling_own.Own"}}))
        code = f"from transformers import BertModel\n\n\nclass Own(BertModel):\n    scale = 2 {sign} 1\n"
        (model / "modeling_own.py").write_text(code)
        digests.append(encoder_for(model, "--trust_remote_code", "True").passages.index_digest)
    assert digests[0] == digests[2] != digests[1]
