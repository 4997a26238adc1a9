"""Every flag works or is refused, in one line that names it; docs/flags.md lists them all."""

import re
import sys
from dataclasses import MISSING, fields

import pytest
import torch
from helpers.data import REPOSITORY, write_jsonl
from helpers.running import encoding_arguments
from transformers import Trainer, TrainingArguments
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

import evaluate
import finetune
import mine_hard_neg
from embedding_finetune.command_line import UserError
from embedding_finetune.mining.arguments import CHOICE_FLAGS
from embedding_finetune.model.bi_encoder import BiEncoder
from embedding_finetune.model.loading import load_backbone
from embedding_finetune.model.sub_batches import padded_texts
from embedding_finetune.training.arguments import DataArguments, ModelArguments, RetrieverTrainingArguments
from embedding_finetune.training.batches import TrainDataset
from embedding_finetune.training.flags import REFUSED
from embedding_finetune.training.loss import LossOptions, RetrievalLoss
from embedding_finetune.training.rows import load_rows
from embedding_finetune.training.run_data import RunData
from embedding_finetune.training.setup import make_trainer

PAGE = (REPOSITORY / "docs/flags.md").read_text(encoding="utf-8").split("## Every flag of finetune.py")[1]
TABLE = dict(re.findall(r"^\| `--(\w+)` \| (\w[\w ]*) \|", PAGE, re.MULTILINE))
DEFAULTS = {field.name: field.default for field in fields(TrainingArguments)}
ONLY_ONE_VALUE = {  # refused for the value that is given here alone
    "do_train": "False",
    "eval_on_start": "False",
    "greater_is_better": "False",
    "restore_callback_states_from_checkpoint": "False",
    "hub_strategy": "every_save",
}
QUERIES = "--eval_query_file_jsonl_path good.jsonl"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "good.jsonl", [{"query": "q", "pos": ["p"]}])
    write_jsonl(tmp_path / "candidates.jsonl", [{"context": ["p"]}])
    return tmp_path


def parse(flags=""):
    words = flags.split() if isinstance(flags, str) else flags
    required = "--model_name_or_path m --train_data good.jsonl --output_dir tuned".split()
    return finetune.parse_arguments([*required, *words])


def refusal(flags, capsys, script=finetune):
    """The one line, on stderr, of a script that ends with status 2 for these flags."""
    required = {
        finetune: "--model_name_or_path m --train_data good.jsonl --output_dir tuned",
        evaluate: "--index_file_jsonl_path candidates.jsonl --query_file_jsonl_path good.jsonl",
        mine_hard_neg: "--input_file good.jsonl --output_file out.jsonl",
    }[script]
    with pytest.raises(SystemExit) as stop:
        script.main([*required.split(), *(flags.split() if isinstance(flags, str) else flags)])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def other_value(flag):
    """A value, as a command line gives it, that is not the flag's default."""
    if flag in ONLY_ONE_VALUE:
        return ONLY_ONE_VALUE[flag]
    kind, default = next((field.type, field.default) for field in fields(TrainingArguments) if field.name == flag)
    if isinstance(default, bool):
        return str(not default)
    if isinstance(default, int | float):
        return str(int(default) + 1)
    return {"debug": "underflow_overflow", "eval_accumulation_steps": "2"}.get(
        flag, "True" if "bool" in str(kind) and "dict" not in str(kind) else "x"
    )


# The table


def test_the_table_lists_every_flag_exactly_once():
    kinds = (ModelArguments, DataArguments, RetrieverTrainingArguments)
    flags = {*(field.name for kind in kinds for field in fields(kind) if field.init), *CHOICE_FLAGS}
    assert sorted(re.findall(r"^\| `--(\w+)` \|", PAGE, re.MULTILINE)) == sorted(flags)
    assert set(TABLE.values()) == {"works", "refused", "refused when"}


def test_the_table_and_the_code_refuse_the_same_flags():
    assert {flag for flag, fate in TABLE.items() if fate == "refused"} == REFUSED.keys() - ONLY_ONE_VALUE.keys()
    assert all(TABLE[flag] == "refused when" for flag in ONLY_ONE_VALUE)


@pytest.mark.parametrize("flag", REFUSED)
def test_a_refused_flag_ends_the_run_with_a_line_that_names_it(folder, capsys, flag):
    assert f"--{flag}" in refusal(f"--{flag} {other_value(flag)}", capsys)


@pytest.mark.parametrize("flag", [flag for flag in REFUSED if DEFAULTS[flag] not in (None, "", MISSING)])
def test_a_refused_flag_may_be_given_with_the_value_that_holds_anyway(folder, flag):
    held = {**dict.fromkeys(ONLY_ONE_VALUE, True), "hub_strategy": "end"}.get(flag, DEFAULTS[flag])
    assert parse(f"--{flag} {held} {QUERIES}")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--eval_steps 5", "--eval_steps"),
        (f"--eval_steps 5 --eval_strategy epoch {QUERIES}", "--eval_steps"),
        ("--save_steps 5 --save_strategy epoch", "--save_steps"),
        ("--logging_steps 5 --logging_strategy epoch", "--logging_steps"),
        ("--eval_delay 2", "--eval_delay"),
        ("--metric_for_best_model eval_MRR@10", "--metric_for_best_model"),
        ("--load_best_model_at_end True --save_strategy no", "--load_best_model_at_end"),
        ("--early_stopping_patience 2", "--early_stopping_patience"),
        ("--save_strategy best", "--save_strategy best"),
        ("--do_eval True", "--do_eval"),
        (f"--do_eval False {QUERIES}", "--do_eval"),
        ("--eval_on_start True", "--eval_on_start"),
        ("--hold_out_by question", "--hold_out_by"),
        ("--candidate_pool candidates.jsonl", "--candidate_pool"),
        ("--hold_out 0.1 --do_eval False", "--do_eval"),
        ("--activation_checkpointing_kwargs {}", "--activation_checkpointing_kwargs"),
        ('--gradient_checkpointing_kwargs {"use_reentrant":false}', "--gradient_checkpointing_kwargs"),
        ("--dataloader_prefetch_factor 2", "--dataloader_prefetch_factor"),
        ("--dataloader_persistent_workers True", "--dataloader_persistent_workers"),
        ("--dataloader_multiprocessing_context spawn", "--dataloader_multiprocessing_context"),
        ("--run_name x", "--run_name"),
        ("--run_name x --report_to tensorboard", "--run_name"),
        ("--project x", "--project"),
        ("--warmup_steps 5 --lr_scheduler_type constant", "--warmup_steps"),
        ('--lr_scheduler_kwargs {"a":1} --lr_scheduler_type constant_with_warmup', "--lr_scheduler_kwargs"),
        ("--teacher_temperature 2", "--teacher_temperature"),
        ("--hub_model_id me/tuned", "--hub_model_id"),
        ("--hub_private_repo True", "--hub_private_repo"),
        ("--hub_revision v2", "--hub_revision"),
        ("--local_rank 0", "--local_rank"),
        ("--optim sgd --adam_beta1 0.8", "--adam_beta1"),
        ("--optim adafactor --adam_epsilon 1e-6", "--adam_epsilon"),
        ("--optim_target_modules attn", "--optim_target_modules"),
        ("--optim_args momentum=0.9", "--optim_args"),
        ("--optim sgd --optim_args momentun=0.9", "--optim_args momentun"),
        ("--optim sgd --optim_args weight_decay=0.1", "--weight_decay"),
    ],
)
def test_a_flag_that_would_do_nothing_without_another_is_refused(folder, capsys, flags, named):
    assert named in refusal(flags, capsys)


@pytest.mark.parametrize(
    "flags",
    [
        f"--eval_steps 5 --eval_strategy steps --do_eval True {QUERIES}",
        f"--save_strategy best --eval_strategy epoch {QUERIES}",
        f"--early_stopping_patience 2 --eval_strategy epoch --save_strategy epoch --eval_delay 1 {QUERIES}",
        f"--lr_scheduler_type greedy --eval_strategy epoch {QUERIES}",
        "--hold_out 0.1 --eval_strategy epoch --save_strategy epoch --early_stopping_patience 2 --do_eval True",
        "--hold_out 20 --hold_out_by customer --candidate_pool candidates.jsonl --save_strategy best "
        f"--eval_strategy epoch {QUERIES}",
        "--do_train --do_eval False --do_predict False",
        "--warmup_steps 0.1 --max_steps -1 --max_grad_norm 0 --num_train_epochs 0.5 --seed 4294967295",
        "--save_steps 0.5 --logging_steps 0.25",
        "--save_steps 5 --save_strategy no --logging_steps 5 --logging_strategy no --eval_steps 5 --eval_strategy no",
        "--optim sgd --optim_args momentum=0.9,nesterov=true",
        "--false_negative_margin 0.1 --neighbours_in_batch 2 --recompute_sub_batches True",
        "--recipe domain --candidate_pool candidates.jsonl --range_for_sampling 5-9 --hold_out_by customer",
        "--mining_rounds 2 --candidate_pool candidates.jsonl --relative_margin 0.05 --embeddings_dir embeddings",
        "--optim rmsprop --optim_args alpha=0.9,centered=false",
        "--optim adagrad --lr_scheduler_type inverse_sqrt",
        '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":1e-6}',
        '--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":10}',
        '--gradient_checkpointing True --gradient_checkpointing_kwargs {"use_reentrant":false}',
        '--activation_checkpointing --activation_checkpointing_kwargs {"every_n_layers":2}',
        "--dataloader_num_workers 2 --dataloader_prefetch_factor 2 --dataloader_persistent_workers True",
        "--local_rank -1 --tf32 False --report_to tensorboard --log_level info --use_cpu True",
        "--query_instruction_for_retrieval= --neftune_noise_alpha 5",
        "--push_to_hub --hub_model_id me/tuned --hub_private_repo True --hub_revision v2 --hub_strategy end",
    ],
)
def test_flags_that_go_together_are_taken(folder, flags):
    assert parse(flags)


# Values that make no sense

NAMED_VALUES = {
    "per_device_train_batch_size": ("0", "-4", "1" + "0" * 30),
    "gradient_accumulation_steps": ("0", "-1"),
    "learning_rate": ("0", "-1", "nan", "inf", "-inf"),
    "num_train_epochs": ("0", "-1", "nan", "inf", "1e300"),
    "max_steps": ("0", "-2"),
    "warmup_steps": ("-1", "nan", "1.5"),
    "weight_decay": ("-0.1", "nan"),
    "adam_beta1": ("1", "-0.1", "nan"),
    "adam_beta2": ("1.5",),
    "adam_epsilon": ("0", "-1"),
    "max_grad_norm": ("-1", "nan"),
    "logging_steps": ("0", "-1", "1.5", "nan"),
    "save_steps": ("0", "-1", "1.5", "inf"),
    "save_total_limit": ("0", "-1"),
    "seed": ("-1", "4294967296"),
    "data_seed": ("-1",),
    "dataloader_num_workers": ("-1", "1025"),
    "ddp_bucket_cap_mb": ("0",),
    "torch_empty_cache_steps": ("0", "-1"),
    "neftune_noise_alpha": ("0", "-5", "nan", "inf"),
    "temperature": ("inf", "nan", "0"),
    "teacher_temperature": ("inf", "nan"),
    "distillation_weight": ("inf", "nan", "-1"),
    "merge_with_base": ("nan", "0", "1"),
    "matryoshka_dims": ("0", "-1", "16 16"),
    "train_group_size": ("0", "1" + "0" * 30),
    "query_max_len": ("0", "1" + "0" * 30),
    "neighbours_in_batch": ("-1",),
    "lora_rank": ("0",),
    "early_stopping_patience": ("0",),
    "hold_out": ("-0.1", "1.5", "nan", "inf", "-3"),
    "fp16": ("True",),
    "tf32": ("True",),
    "report_to": ("nonesuch",),
    "optim": ("adamw_bnb_8bit", "adamw_torch_4bit", "adamw_torch_xla", "nonesuch", "lomo", "schedule_free_adamw"),
    "lr_scheduler_type": ("cosine_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau", "nonesuch"),
    "lr_scheduler_kwargs": ("{bad", "[1]", "file.json", '{"nonesuch":1}'),
    "log_level": ("loud",),
    "train_sampling_strategy": ("group_by_length", "batch_rebalance"),
}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 and tf32 may work here")
@pytest.mark.parametrize(
    ("flag", "value"), [(flag, value) for flag, values in NAMED_VALUES.items() for value in values]
)
def test_a_value_that_makes_no_sense_is_refused_by_name(folder, capsys, flag, value):
    assert f"--{flag}" in refusal(f"--{flag} {value}", capsys)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--matryoshka_dims 16 --matryoshka_weights nan", "--matryoshka_weights"),
        ("--matryoshka_dims 16 --matryoshka_weights inf", "--matryoshka_weights"),
        ("--fp16 True --bf16 True", "--fp16"),
        ("--optim sgd --optim_args momentum", "--optim_args"),
        ("--optim sgd --optim_args momentum=-1", "--optim_args"),
        ("--optim sgd --optim_args momentum=nan", "--optim_args"),
        ("--optim galore_adamw --optim_target_modules attn", "--optim galore_adamw"),
        ("--lr_scheduler_type polynomial --learning_rate 1e-8", "--lr_scheduler_type"),
        ('--lr_scheduler_type cosine_with_restarts --lr_scheduler_kwargs {"num_cycles":"a"}', "--lr_scheduler_kwargs"),
        ("--gradient_checkpointing True --gradient_checkpointing_kwargs {bad", "--gradient_checkpointing_kwargs"),
        ('--activation_checkpointing --activation_checkpointing_kwargs {"x":1}', "--activation_checkpointing_kwargs"),
        ('--activation_checkpointing --activation_checkpointing_kwargs {"use_reentrant":true}', "use_reentrant"),
        ('--activation_checkpointing --activation_checkpointing_kwargs {"every_n_layers":0}', "every_n_layers"),
        (f"--load_best_model_at_end True --eval_strategy epoch {QUERIES}", "--load_best_model_at_end"),
        (f'--lr_scheduler_type greedy --lr_scheduler_kwargs {{"mode":"min"}} --eval_strategy epoch {QUERIES}', "mode"),
        ("--hold_out 0.1 --hold_out_by pos", "--hold_out_by pos: give `passage`"),
        ("--hold_out 0.1 --hold_out_by title --columns query=title", "--hold_out_by title: give `passage`"),
        ("--hold_out 0.1 --candidate_pool none.jsonl", "--candidate_pool: none.jsonl does not exist"),
        ("--judgements none.jsonl", "--judgements: none.jsonl does not exist"),
        ("--judgements good.jsonl --distillation_weight 1", "give them to mine_hard_neg.py with --save_scores"),
        ("--warmup_ratio 0.1", "use --warmup_steps"),
        ("--evaluation_strategy epoch", "use --eval_strategy"),
        ("--no_such_flag 1", "--no_such_flag"),
    ],
)
def test_flags_that_make_no_sense_together_are_refused_by_name(folder, capsys, flags, named):
    assert named in refusal(flags, capsys)


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "a parallelism config"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--torch_compile"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "fp8"),
    ],
)
def test_what_is_not_supported_is_refused_where_a_launcher_asks_for_it(
    folder, capsys, monkeypatch, variable, value, name
):
    monkeypatch.setenv(variable, value)
    assert name in refusal("", capsys)


@pytest.mark.parametrize(
    "flags",
    ["--fsdp", "--fsdp True", "--fsdp full_shard", '--fsdp_config {"x":1}', "--deepspeed x.json", "--deepspeed none"],
)
def test_sharded_training_is_refused_by_flag_and_torchrun_named(folder, capsys, flags):
    assert "not supported; torchrun alone trains on several GPUs" in refusal(flags, capsys)


def test_fsdp_that_only_accelerate_knows_of_is_refused_when_the_trainer_is_made(tmp_path, tiny_bert, monkeypatch):
    create = Trainer.create_accelerator_and_postprocess

    def with_fsdp(self):
        create(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", with_fsdp)
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "good.jsonl", [{"query": "q", "pos": ["p"], "neg": ["n"]}])
    args = parse()
    args[0].model_name_or_path = str(tiny_bert)
    dataset = TrainDataset(load_rows("good.jsonl"), group_size=2, seed=0)
    with pytest.raises(UserError, match="torchrun alone"):
        make_trainer(*args, RunData(dataset))


# Given twice, empty, or not UTF-8


def test_flags_of_several_values_extend_when_they_are_repeated(folder):
    common = ["--index_file_jsonl_path", "candidates.jsonl", "--query_file_jsonl_path", "good.jsonl"]
    flags = "--model_name a b --model_name c --cutoffs 3 --cutoffs 7 --measures Recall --measures nDCG"
    args = evaluate.parse_arguments(
        [*common, *flags.split(), "--fail_below", "Recall@3=.1", "--fail_below", "nDCG@7=.2"]
    )
    assert args.model_name == ["a", "b", "c"]
    assert args.cutoffs == [3, 7]  # the default is replaced, not extended
    assert args.measures == ["Recall", "nDCG"]
    assert args.fail_below == [("Recall@3", 0.1), ("nDCG@7", 0.2)]
    assert "given" not in vars(args)
    assert evaluate.parse_arguments([*common, "--model_name", "d"]).model_name == ["d"]
    args = mine_hard_neg.parse_arguments(
        "--model_name_or_path a --model_name_or_path b --input_file good.jsonl --output_file o".split()
    )
    assert args.model_name_or_path == ["a", "b"]
    assert parse("--matryoshka_dims 16 --matryoshka_dims 8 4")[2].matryoshka_dims == [16, 8, 4]
    assert parse("--matryoshka_dims 2")[2].matryoshka_dims == [2]
    assert parse("--train_data good.jsonl .")[1].train_data == ["good.jsonl", "good.jsonl", "."]


@pytest.mark.parametrize(
    ("script", "flags", "named"),
    [
        (evaluate, "--model_name a --seed 1 --seed 1", "--seed"),
        (evaluate, "--model_name a --seed=1 --seed 2", "--seed"),
        (evaluate, "--model_name a --json --json", "--json"),
        (evaluate, "--model_name a b --fail_if_worse --fail_if_worse", "--fail_if_worse"),
        (evaluate, "--model_name a --normalized --normalized False", "--normalized"),
        (evaluate, "--model_name a --index_file_jsonl_path b", "--index_file_jsonl_path"),
        (mine_hard_neg, "--model_name_or_path a --save_scores --save_scores", "--save_scores"),
        (mine_hard_neg, "--model_name_or_path a --range_for_sampling 0-5 --range_for_sampling=0-6", "--range_for"),
        (finetune, "--output_dir b", "--output_dir"),
        (finetune, "--output-dir b", "--output-dir"),
        (finetune, "--bf16 True --bf16", "--bf16"),
        (finetune, "--use_inbatch_neg True --no_use_inbatch_neg", "--no_use_inbatch_neg"),
    ],
)
def test_any_other_flag_is_refused_when_it_is_given_twice(folder, capsys, script, flags, named):
    assert f"argument {named}" in refusal(flags, capsys, script)


@pytest.mark.parametrize("script", [evaluate, mine_hard_neg, finetune])
@pytest.mark.parametrize(
    ("value", "why"), [("caf\udce9", "is not UTF-8"), ("", "is empty"), ("a\0b", "null character")]
)
def test_a_value_that_no_file_could_hold_is_refused_by_name(folder, capsys, script, value, why):
    line = refusal(["--cache_dir", value], capsys, script)
    assert "--cache_dir" in line
    assert why in line
    assert why in refusal([f"--cache_dir={value}"], capsys, script)


def test_an_instruction_may_be_empty(folder):
    assert parse(["--query_instruction_for_retrieval", ""])[1].query_instruction_for_retrieval == ""
    assert encoding_arguments("--query_instruction_for_retrieval", "").query_instruction_for_retrieval == ""


def test_a_file_of_flags_beside_the_script_is_not_read(folder, monkeypatch):
    (folder / "finetune.args").write_text("--learning_rate 1")
    monkeypatch.setattr(sys, "argv", [str(folder / "finetune.py")])
    assert parse()[2].learning_rate == 5e-5


# The flags of the other two scripts


@pytest.mark.parametrize(
    ("script", "flags", "named"),
    [
        (evaluate, "--model_name a --seed -1", "--seed"),
        (evaluate, "--model_name a --seed 4294967296", "--seed"),
        (mine_hard_neg, "--model_name_or_path a --seed -1", "--seed"),
        (mine_hard_neg, "--model_name_or_path a --seed 1.5", "--seed"),
        (evaluate, "--model_name a a/", "--model_name"),
        (evaluate, "--model_name a --model_name a", "--model_name"),
        (mine_hard_neg, "--model_name_or_path a --model_name_or_path a/", "--model_name_or_path"),
        (evaluate, "--model_name a --cutoffs 0", "--cutoffs"),
        (evaluate, "--model_name a --cutoffs 1_000", "--cutoffs"),
        (evaluate, "--model_name a --cutoffs \uff11\uff10", "--cutoffs"),
        (evaluate, f"--model_name a --cutoffs 1{'0' * 30}", "--cutoffs"),
        (mine_hard_neg, f"--model_name_or_path a --negative_number 1{'0' * 30}", "--negative_number"),
        (mine_hard_neg, f"--model_name_or_path a --range_for_sampling 0-1{'0' * 30}", "--range_for_sampling"),
        (evaluate, "--model_name a --truncate_dim 64 32", "--truncate_dim: several values are"),
        (evaluate, "--model_name a --sizes --truncate_dim 64 0", "--truncate_dim"),
        (mine_hard_neg, "--model_name_or_path a --truncate_dim 64 32", "unrecognized arguments: 32"),
        (mine_hard_neg, "--model_name_or_path a --truncate_dim 64 --truncate_dim 32", "--truncate_dim: given twice"),
        (evaluate, "--model_name a --fail_below MRR@10=nan", "--fail_below"),
        (evaluate, "--model_name a --fail_below MRR@010=0.5", "MRR@010 is not measured"),
        (evaluate, "--model_name a --fail_below MRR@\uff11\uff10=0.5", "--fail_below"),
    ],
)
def test_odd_values_of_the_other_scripts_are_refused_by_name(folder, capsys, script, flags, named):
    assert named in refusal(flags, capsys, script)


# Flags that were broken


def noisy_inputs(model, alpha, *, training=True):
    """What the backbone sees of two texts with one repeated token, with NEFTune's hook on."""
    seen = []
    hook = model.bi_encoder.backbone.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(inputs["inputs_embeds"].detach()), with_kwargs=True
    )
    handle = activate_neftune(model, alpha) if alpha else None
    model.train(training)
    torch.manual_seed(0)
    model.bi_encoder.encode_in_sub_batches(padded_texts(torch.full((2, 64), 7), torch.ones(2, 64, dtype=torch.long)))
    hook.remove()
    if handle:
        deactivate_neftune(model, handle)
    return torch.cat(seen)


def test_neftune_adds_its_own_noise_to_each_token_of_each_text_in_training_only(tiny_bert):
    backbone, _, config = load_backbone(str(tiny_bert), flag="--model")
    model = RetrievalLoss(BiEncoder(backbone, config), LossOptions())
    plain = noisy_inputs(model, None)
    noise = noisy_inputs(model, 5.0) - plain  # (2, 64, 32)
    limit = 5.0 / (64 * 32) ** 0.5
    assert noise.abs().max() <= limit * 1.0001
    assert noise.std().item() == pytest.approx(limit / 3**0.5, rel=0.03)  # of a uniform distribution
    assert len(noise[..., 0].unique()) == 2 * 64
    assert torch.equal(noisy_inputs(model, 5.0, training=False), plain)
    assert torch.equal(noisy_inputs(model, None), plain)
    assert not any("token_embeddings" in name for name in model.state_dict() if ".backbone." not in name)


def test_a_schedule_that_follows_a_measure_lowers_the_rate_when_the_measure_falls(folder):
    flags = f"--lr_scheduler_type reduce_lr_on_plateau --eval_strategy epoch {QUERIES}"
    args = parse([*flags.split(), "--lr_scheduler_kwargs", '{"patience": 3}'])[2]
    assert args.lr_scheduler_kwargs == {"mode": "max", "patience": 3}
    assert args.metric_for_best_model == "eval_MRR@10"
    assert args.greater_is_better


def test_early_stopping_in_a_resumed_run_counts_on_where_it_stopped(tiny_bert, pairs, tmp_path, caplog):
    def steps(*flags):
        argv = (
            f"--model_name_or_path {tiny_bert} --train_data {pairs} --output_dir {tmp_path}/tuned --train_group_size 1"
        )
        argv += f" --eval_query_file_jsonl_path {pairs} --eval_strategy steps --eval_steps 2 --save_strategy steps"
        argv += " --save_steps 2 --early_stopping_patience 4 --learning_rate 1e-12 --max_steps 20 --disable_tqdm True"
        caplog.clear()
        with caplog.at_level("INFO", "embedding_finetune"):
            finetune.main([*argv.split(), *flags])
        return next(record.args[1] for record in caplog.records if record.args and record.args[0] == "steps")

    assert steps() == "10"  # the first of five measures is the best
    assert steps("--resume_from_checkpoint", f"{tmp_path}/tuned/checkpoint-8") == "10"


def test_a_checkpoint_without_an_optimizer_cannot_be_resumed(folder, capsys):
    (folder / "tuned" / "checkpoint-2").mkdir(parents=True)
    (folder / "tuned" / "checkpoint-2" / "trainer_state.json").write_text("{}")
    line = refusal("--resume_from_checkpoint True", capsys)
    assert "--save_only_model" in line
    assert "--model_name_or_path" in line


def test_a_count_may_have_a_sign_and_zeros():
    assert encoding_arguments("--passage_max_len", "+0010").passage_max_len == 10
