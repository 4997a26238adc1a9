"""The command line of finetune.py: help in groups, and checks of flags that belong to several dataclasses."""

import os
import shutil
from argparse import Action
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from transformers import HfArgumentParser, IntervalStrategy

from embedding_finetune import files
from embedding_finetune.command_line import UserError, first_line
from embedding_finetune.mining.arguments import SelectionOptions, add_choice_arguments
from embedding_finetune.parser import DocstringAndDefaults, OneLineErrorParser
from embedding_finetune.training.arguments import (
    SCHEDULES_BY_MEASURE,
    DataArguments,
    ModelArguments,
    RetrieverTrainingArguments,
)
from embedding_finetune.training.flag_errors import errors_name_their_flag
from embedding_finetune.training.flags import REFUSED, check_given, check_known, check_needs
from embedding_finetune.training.freezing import check_freezing
from embedding_finetune.training.optimizer import check_optimizer_takes
from embedding_finetune.training.run_folder import check_output_dir

GROUPS = {
    "model": "model_name_or_path config_name tokenizer_name cache_dir trust_remote_code sentence_pooling_method "
    "normalized freeze_passages fix_position_embedding lora_rank",
    "recipe and length": "recipe minutes",
    "data": "train_data columns judgements train_group_size neighbours_in_batch one_file_per_batch query_max_len "
    "passage_max_len query_instruction_for_retrieval passage_instruction_for_retrieval max_example_num_per_dataset",
    "mining before each round": "mining_rounds range_for_sampling negative_number sampling_strategy max_score "
    "min_score absolute_margin relative_margin near_duplicate_threshold embeddings_dir",
    "loss": "temperature use_inbatch_neg mask_known_positives negatives_cross_device "
    "false_negative_margin matryoshka_dims "
    "matryoshka_weights distillation_weight teacher_temperature",
    "memory and speed": "dropout tokens_per_sub_batch recompute_sub_batches",
    "evaluation during training": "hold_out hold_out_by candidate_pool eval_query_file_jsonl_path "
    "eval_index_file_jsonl_path early_stopping_patience",
    "output": "output_dir overwrite_output_dir resume_from_checkpoint save_adapter_only merge_with_base "
    "push_to_hub hub_model_id hub_private_repo hub_revision",
}
"""Title -> the suite's own flags, and some of transformers'. Help shows them in this order, before all others."""

_HELP = {
    "output_dir": "where the model, its checkpoints and training_summary.json are written",
    "push_to_hub": "upload the finished model, without checkpoints and held-out rows, to the hub",
    "hub_model_id": "OWNER/NAME of where it is uploaded (default: the output folder's name, of the token's owner)",
    "hub_private_repo": "whether a repository that is made for it is private (default: as its owner has set it)",
    "hub_revision": "the branch it is uploaded to (default: main)",
    "resume_from_checkpoint": "True, or a checkpoint folder of the run: go on exactly where it stopped",
}
"""What transformers' own texts do not say, or say of other scripts."""

_TRANSFORMERS = "training, as transformers does it"
_REFUSED = "transformers' flags that are refused, since they would do nothing or harm here"
_MOST_WORKERS = 8
_SHARED_MEMORY, _LEAST_SHARED_MEMORY = "/dev/shm", 2**30
"""Workers hand batches over there. In a container it may have 64 MB."""
_USAGE = "finetune.py --model_name_or_path MODEL --train_data FILE --output_dir DIR [further flags]"

Arguments = tuple[ModelArguments, DataArguments, RetrieverTrainingArguments]


class Parser(HfArgumentParser, OneLineErrorParser):
    """transformers' parser of dataclasses, with our one-line errors, before it makes the dataclasses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        add_choice_arguments(self)
        for action in self._actions:
            if f"--no_{action.dest}" in action.option_strings:
                action.help = f"the same as --{action.dest} False"
            action.help = _HELP.get(action.dest, action.help)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; unknown flags end in one line that says what is meant."""
        found, rest = super().parse_known_args(args, namespace)
        check_known(rest)
        check_given(self.given, {flag: self.get_default(flag) for flag in self.given})
        return found, rest

    def format_help(self) -> str:
        """The help in sections, as GROUPS has them."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        for title, actions in self._sections():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()

    def _sections(self) -> Iterator[tuple[str, list[Action]]]:
        left: dict[str, list[Action]] = {action.dest: [] for action in self._actions}
        for action in self._actions:
            left[action.dest].append(action)
        for title, flags in GROUPS.items():
            yield title, [action for flag in flags.split() for action in left.pop(flag)]
        refused = [action for flag in REFUSED for action in left.pop(flag)]
        yield _TRANSFORMERS, [action for actions in left.values() for action in actions]
        yield _REFUSED, refused


def parse_arguments(argv: Sequence[str] | None, description: str) -> Arguments:
    """The flags, checked as far as that needs neither data nor model. Raises UserError for what makes no sense."""
    parser = Parser(
        (ModelArguments, DataArguments, RetrieverTrainingArguments),
        usage=_USAGE,
        description=description,
        formatter_class=DocstringAndDefaults,
        allow_abbrev=False,
    )
    try:
        with errors_name_their_flag(parser.given):
            # A file finetune.args beside the script would else be read as flags.
            *parsed, choice = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except (ValueError, ImportError) as error:
        raise UserError(f"{first_line(error)} (--help lists the flags)") from error
    model_args, data_args, args = parsed
    data_args.selection = SelectionOptions(**vars(choice), seed=args.seed)
    if "passage_max_len" in parser.given:
        data_args.given_passage_max_len = data_args.passage_max_len
    suit_the_device(args, parser.given)
    check_together(parser.given, model_args, data_args, args)
    return model_args, data_args, args


def suit_the_device(args: RetrieverTrainingArguments, given: Container[str]) -> None:
    """Choose what a CUDA GPU needs: workers that make batches, if the user gave no number, and no wait."""
    if args.device.type != "cuda":
        return
    if "dataloader_num_workers" not in given:
        args.dataloader_num_workers = _workers()
    args.accelerator_config.non_blocking = args.dataloader_pin_memory  # copies that nobody waits for
    args.logging_nan_inf_filter = False  # it waits for each step; LossWatch looks at every loss


def _workers() -> int:
    """Half of the cores that this process may use; none where they would lack memory to hand batches over in."""
    if os.path.isdir(_SHARED_MEMORY) and shutil.disk_usage(_SHARED_MEMORY).free < _LEAST_SHARED_MEMORY:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", 1))), 1), _MOST_WORKERS)


def check_together(
    given: Mapping[str, object], model_args: ModelArguments, data_args: DataArguments, args: RetrieverTrainingArguments
) -> None:
    """Raise UserError for flags that are good each by itself, and not together.

    given: flag -> value, of the flags on the command line alone.
    """
    check_needs(given, data_args, args)
    check_optimizer_takes(given, args)
    check_output_dir(model_args, data_args, args)
    if args.freeze_passages:
        check_freezing(given)
    else:
        _check_negatives(data_args, args)
    if args.uploads and args.save_adapter_only and os.path.isdir(model_args.model_name_or_path):
        raise UserError(
            f"--push_to_hub: an adapter alone needs its base, and others do not have {model_args.model_name_or_path}; "
            "give --model_name_or_path a name of the hub, or leave out --save_adapter_only"
        )
    if args.false_negative_margin is not None and not (args.rows_share_negatives or args.freeze_passages):
        raise UserError(
            f"--false_negative_margin {args.false_negative_margin:g}: no passage of another row is a negative; give "
            "--use_inbatch_neg True and a --per_device_train_batch_size of at least 2, or leave it out"
        )
    if data_args.judgements and args.distillation_weight > 0:
        raise UserError(
            "--judgements: passages that they add have no teacher's scores; give them to mine_hard_neg.py with "
            "--save_scores, and leave the flag out here"
        )
    if data_args.neighbours_in_batch:
        _check_neighbours(args)
    if data_args.mining_rounds:
        _check_rounds(data_args, args)
    _check_folders(data_args, args)
    if data_args.one_file_per_batch:
        _check_one_file(args)
    if args.minutes is not None:
        _check_minutes(given, args)
    has_queries = data_args.hold_out is not None or data_args.eval_query_file_jsonl_path is not None
    has_queries |= data_args.recipe is not None  # which may hold some out
    if not has_queries and args.eval_strategy != IntervalStrategy.NO:
        raise UserError(f"--eval_strategy {args.eval_strategy.value} needs --hold_out or --eval_query_file_jsonl_path")


def _check_negatives(data_args: DataArguments, args: RetrieverTrainingArguments) -> None:
    """Raise UserError where every query would have only its positive to be compared with."""
    if data_args.train_group_size > 1 or args.rows_share_negatives:
        return
    if not args.use_inbatch_neg:
        raise UserError("--train_group_size 1 with --use_inbatch_neg False leaves no negatives: the loss is 0")
    raise UserError("--train_group_size 1 with --per_device_train_batch_size 1 leaves no negatives: the loss is 0")


def _check_neighbours(args: RetrieverTrainingArguments) -> None:
    """Raise UserError where --neighbours_in_batch could have no effect."""
    if not args.use_inbatch_neg:
        raise UserError("--neighbours_in_batch needs --use_inbatch_neg True: they are negatives of one another")
    if not args.rows_share_negatives:
        raise UserError("--neighbours_in_batch needs a --per_device_train_batch_size of at least 2")
    if args.train_sampling_strategy != "random":
        raise UserError(f"--neighbours_in_batch is not for --train_sampling_strategy {args.train_sampling_strategy}")


def _check_rounds(data_args: DataArguments, args: RetrieverTrainingArguments) -> None:
    """Raise UserError for what mining while training cannot do, or would make no use of."""
    what = f"--mining_rounds {data_args.mining_rounds}"
    if data_args.train_group_size == 1 and not data_args.neighbours_in_batch:
        raise UserError(f"{what} needs a --train_group_size of at least 2, or --neighbours_in_batch: for its negatives")
    if args.distillation_weight > 0:
        raise UserError(f"{what}: mined negatives have no teacher's scores; leave --distillation_weight out")
    if args.dataloader_persistent_workers:
        raise UserError(
            f"{what}: persistent workers keep the first negatives; leave --dataloader_persistent_workers out"
        )


def _check_folders(data_args: DataArguments, args: RetrieverTrainingArguments) -> None:
    """Raise UserError where a folder that is written is, or lies in, one that is read."""
    if data_args.embeddings_dir is not None:
        folders: dict[str, str | None] = {"--output_dir": args.output_dir, "--embeddings_dir": data_args.embeddings_dir}
        for path in data_args.train_data:
            files.require_apart({"--train_data": path}, folders)
        files.require_apart({"--candidate_pool": data_args.candidate_pool}, folders)


def _check_minutes(given: Mapping[str, object], args: RetrieverTrainingArguments) -> None:
    """Raise UserError where something else says how long training is, or nothing says it before the end."""
    for flag in ("max_steps", "num_train_epochs"):
        if flag in given:
            raise UserError(f"--minutes {args.minutes:g} and --{flag} {given[flag]}: give one of them")
    if args.lr_scheduler_type in SCHEDULES_BY_MEASURE:
        raise UserError(
            f"--minutes needs an --lr_scheduler_type that depends on the step alone, not {args.lr_scheduler_type.value}"
        )


def _check_one_file(args: RetrieverTrainingArguments) -> None:
    """Raise UserError where --one_file_per_batch could have no effect."""
    if not args.use_inbatch_neg:
        raise UserError("--one_file_per_batch needs --use_inbatch_neg True: rows of a batch share their negatives")
    if args.per_device_train_batch_size == 1 and not (args.negatives_cross_device and args.world_size > 1):
        raise UserError("--one_file_per_batch needs a --per_device_train_batch_size of at least 2")
