"""modules.json and the modules' own files. What sentence-transformers makes of them is in test_checkpoint.py."""

import pytest

from embedding_finetune.command_line import UserError
from embedding_finetune.model.module_configs import (
    KINDS,
    DenseConfig,
    DropoutConfig,
    LayerNormConfig,
    check_order,
    listed_modules,
    module_config,
    module_file,
    module_name,
    pooling_file,
    pooling_method,
)
from embedding_finetune.model.side_files import SideFile


def modules(*kinds):
    return [{"type": f"sentence_transformers.models.{kind}", "path": f"{n}_{kind}"} for n, kind in enumerate(kinds)]


@pytest.mark.parametrize(
    "kinds", [["Transformer", "Pooling"], ["Transformer", "Pooling", "Dense", "Dropout", "LayerNorm", "Normalize"]]
)
def test_kinds_and_folders_are_read_in_order(kinds):
    check_order("f", listed_modules("f", modules(*kinds)))
    assert listed_modules("f", modules(*kinds)) == [(kind, f"{n}_{kind}") for n, kind in enumerate(kinds)]


@pytest.mark.parametrize(
    "kinds", [["Transformer"], ["Pooling"], ["Transformer", "Pooling", "Normalize", "Dense"], ["CLIPModel", "Pooling"]]
)
def test_modules_that_are_not_applied_here_are_refused_by_name(kinds):
    with pytest.raises(UserError, match=f"f: asks for {' > '.join(kinds)}; only Transformer > Pooling"):
        check_order("f", listed_modules("f", modules(*kinds)))


@pytest.mark.parametrize(
    "config",
    [
        DenseConfig(8, 4, bias=False, activation="identity", folder="2_Dense"),
        DenseConfig(8, 4, bias=True, activation="tanh", folder="2_Dense"),
        LayerNormConfig(8, "2_LayerNorm"),
        DropoutConfig(0.25, "2_Dropout"),
    ],
)
def test_a_module_is_read_as_it_is_written(config):
    assert module_config(KINDS[type(config)], config.folder, SideFile("f", module_file(config))) == config


def test_modules_that_embed_differently_have_different_names():
    dense = [DenseConfig(8, 8, bias=True, activation=name, folder="") for name in ("tanh", "identity")]
    assert len({module_name(config) for config in (*dense, LayerNormConfig(8, ""))}) == 3


@pytest.mark.parametrize("method", ["mean", "cls+max", "mean+cls", "lasttoken+weightedmean+max"])
def test_a_pooling_is_read_as_it_is_written_and_in_the_old_spelling_where_that_says_enough(method):
    content = pooling_file(method, 8, include_prompt=False)
    assert pooling_method(SideFile("f", content)) == method
    assert ("pooling_mode" in content) == (method in ("mean+cls", "lasttoken+weightedmean+max"))
    assert content["include_prompt"] is False
