"""The part of the training rows that is kept out of training, and measured: drawn, written, told.

held_out.jsonl              its queries, as evaluate.py reads them
held_out_candidates.jsonl   the passages they are searched among: all of the data, and --candidate_pool

Both lie in the output folder. Which rows are drawn is decided in data/hold_out.py.

Shapes: R rows, N keys of all rows, G groups.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np

from embedding_finetune.command_line import UserError
from embedding_finetune.data import jsonl
from embedding_finetune.data.corpus import Corpus, Documents
from embedding_finetune.data.hold_out import Keys, draw, halve, how_many, places, tie, what_is_new
from embedding_finetune.data.jsonl import Record
from embedding_finetune.data.records import HELD_OUT_BY, read_passages
from embedding_finetune.data.task import RetrievalTask, make_task
from embedding_finetune.data.texts import folded_id, text_id
from embedding_finetune.distributed import once_per_machine
from embedding_finetune.files import AnyPath
from embedding_finetune.training.arguments import DataArguments
from embedding_finetune.training.choosing import CHOOSING, JUDGING, part_of, with_parts
from embedding_finetune.training.row_columns import flatten_column, read_column
from embedding_finetune.training.rows import all_passages, keep_rows, stored_rows

logger = logging.getLogger(__name__)

QUERIES_FILE, CANDIDATES_FILE = FILES = ("held_out.jsonl", "held_out_candidates.jsonl")
_TEXTS_PER_READ = 1000
_SHOWN_CHARACTERS = 80


class Split(NamedTuple):
    """Which rows are held out. rows: (R,) bool. groups: how many groups that are. all_groups: of all rows.

    largest_group: its rows. tied_by: where they are more than half of all rows, the text that most of them have, and
    how many have it. choosing: (R,) bool, which of them may choose weights, see choosing.py.
    """

    rows: np.ndarray
    choosing: np.ndarray
    groups: int
    all_groups: int
    largest_group: int
    tied_by: tuple[str, int] | None


class HeldOut(NamedTuple):
    """Queries that were kept out of training, as a retrieval task, and what the summary says about them.

    records: the rows of QUERIES_FILE. task: the same among the passages of CANDIDATES_FILE. digest: a hash of both.
    judging: where queries choose weights, those that judge them; task then has those that choose.
    """

    records: list[Record]
    task: RetrievalTask
    facts: Record
    digest: str
    judging: RetrievalTask | None = None

    def count_queries_among(self, ids: np.ndarray) -> int:
        """How many queries have their text_id in ids (any,)."""
        return sum(part.count_queries_among(ids) for part in (self.task, self.judging) if part is not None)


def hold_out(
    rows: datasets.Dataset, data_args: DataArguments, *, seed: int, chosen_by: str | None = None
) -> tuple[datasets.Dataset, HeldOut | None]:
    """The rows to train on, and those that --hold_out keeps back; all rows and None without it.

    rows: as rows.load_rows gives them. chosen_by: what choosing.flag_that_chooses gave. The same rows, flags and seed
    give the same split in every process and run. Raises UserError where nothing could be held out, nothing would be
    left to train on, or too few queries are held out for some of them to choose.
    """
    asked = data_args.hold_out
    if asked is None:
        return rows, None
    by = data_args.hold_out_by
    split = once_per_machine(lambda: split_rows(rows, asked=asked, by=by, field=data_args.hold_out_field, seed=seed))
    held = keep_rows(rows, split.rows)
    records, choosing = _queries(held, split.choosing[split.rows], by, data_args.hold_out_field)
    records = _with_usable_ids(records)
    pool = () if data_args.candidate_pool is None else read_passages(data_args.candidate_pool, data_args.columns)
    corpus = Corpus(itertools.chain(all_passages(rows), pool))
    kept = keep_rows(rows, ~split.rows)
    answers = np.unique(flatten_column(held, "pos_ids")[1])
    facts = {
        "asked": asked,
        "by": by,
        "what_is_new": what_is_new(by),
        "queries": len(records),
        "rows": len(held),
        "rows_trained": len(kept),
        "answers": len(answers),
        "answers_trained": int(np.isin(answers, flatten_column(kept, "pos_ids")[1]).sum()),
        "groups": split.groups,
        "largest_group": split.largest_group,
        "tied_by": None if split.tied_by is None else split.tied_by[0],
    }
    if chosen_by is not None:
        records = with_parts(records, choosing, flag=chosen_by)
        facts["queries_that_choose"] = sum(choosing)
    _tell(facts, split, how_many(asked, len(np.unique(read_column(rows, "query_id")))))
    digest = hashlib.blake2b(json.dumps([records, corpus.digest()]).encode(), digest_size=16).hexdigest()
    if chosen_by is None:
        return kept, HeldOut(records, make_task(records, corpus), facts, digest)
    tasks = [make_task(part_of(records, part), corpus) for part in (CHOOSING, JUDGING)]
    return kept, HeldOut(records, tasks[0], facts, digest, judging=tasks[1])


def split_rows(rows: datasets.Dataset, *, asked: float, by: str, field: str | None, seed: int) -> Split:
    """Draw the rows that are held out.

    Rows with the same query are one group, so that no query is trained on and measured. So are, by `passage`, rows with
    a positive in common, and by a field, rows with the same value of it.
    """
    ties = {"query": _keys(rows, "query_key")}
    if field is not None:
        ties["field"] = _keys(rows, "field_key")
    elif by == "passage":
        ties["pos"] = Keys(*flatten_column(rows, "pos_keys"))
    groups = tie(len(rows), list(ties.values()))
    _, first = np.unique(read_column(rows, "query_id"), return_index=True)
    sizes = np.bincount(groups[first], minlength=groups.max() + 1)  # (G,), in queries; a query is in one group
    # What a group is known by is what stays when it gets a new question: its passages, or the value of its field.
    known_by = list(ties.values())[-1]
    order = places(groups, known_by, seed=seed)
    count = how_many(asked, len(first))
    if not 0 < count < len(first):
        raise UserError(_no_such_number(asked, count, len(first)))
    taken = draw(sizes, order, asked)
    if not taken.any():
        raise UserError(_all_too_large(asked, count, sizes, _most_shared(rows, ties, groups == sizes.argmax())[0]))
    members = np.bincount(groups)  # (G,), in rows
    largest = int(members.argmax())
    dominates = 2 * members[largest] > len(rows)
    return Split(
        rows=taken[groups],
        choosing=halve(np.where(taken, sizes, 0), groups, known_by, seed=seed)[groups],
        groups=int(taken.sum()),
        all_groups=len(members),
        largest_group=int(members[largest]),
        tied_by=_most_shared(rows, ties, groups == largest) if dominates else None,
    )


def _all_too_large(asked: float, count: int, sizes: np.ndarray, shared: str) -> str:
    if len(sizes) == 1:
        return (
            f"--hold_out {asked:g}: all rows belong together, by what they share, most of all {shared!r}; give another "
            "--hold_out_by, or leave such rows out"
        )
    return (
        f"--hold_out {asked:g}: that is {count} of {sizes.sum()} queries, and the smallest of {len(sizes)} groups of "
        f"rows that belong together has {sizes.min()}; give --hold_out {sizes.min()} or more, or another --hold_out_by"
    )


def _no_such_number(asked: float, count: int, queries: int) -> str:
    if count == 0:
        return f"--hold_out {asked:g}: that is less than one of {queries} queries; give a number of queries"
    return f"--hold_out {asked:g}: there are {queries} queries, and none would be left to train on"


def _keys(rows: datasets.Dataset, column: str) -> Keys:
    return Keys(np.arange(len(rows)), read_column(rows, column))


def _most_shared(rows: datasets.Dataset, ties: dict[str, Keys], members: np.ndarray) -> tuple[str, int]:
    """The text, or value of the field, that most rows of a group have, and how many have it. members: (R,) bool."""
    best, shared = 0, ""
    for column, keys in ties.items():
        within = members[keys.rows]
        order = np.lexsort((keys.rows[within], keys.numbers[within]))
        owners, numbers = keys.rows[within][order], keys.numbers[within][order]
        repeated = (owners[1:] == owners[:-1]) & (numbers[1:] == numbers[:-1])  # a row may have a text twice
        once = np.append(True, ~repeated)
        names, first, counts = np.unique(numbers[once], return_index=True, return_counts=True)
        most = int(counts.argmax())
        if counts[most] > best:
            best = int(counts[most])
            value = rows[int(owners[once][first[most]])][column]
            identity = text_id if column == "field" else folded_id
            texts = value if isinstance(value, list) else [value]
            shared = next(text for text in texts if identity(text) == names[most])
    return shared if len(shared) <= _SHOWN_CHARACTERS else shared[:_SHOWN_CHARACTERS] + "...", best


def _tell(facts: Record, split: Split, wanted: int) -> None:
    logger.info(
        "held out by %s: %d queries (%d rows) in %d of %d groups: %s; %d of their %d answers are trained on too; "
        "%d rows are trained on; the largest group has %d rows",
        *(facts["by"], facts["queries"], facts["rows"], split.groups, split.all_groups, facts["what_is_new"]),
        *(facts["answers_trained"], facts["answers"], facts["rows_trained"], split.largest_group),
    )
    if "queries_that_choose" in facts:
        logger.info(
            "%d of the held-out queries choose weights, and the other %d judge",
            *(facts["queries_that_choose"], facts["queries"] - facts["queries_that_choose"]),
        )
    if split.tied_by is not None:
        text, count = split.tied_by
        logger.warning(
            "warning: one group holds %d of all %d rows, which are trained on or held out together: they are tied by "
            "what they share, most of all %s, which is in %d of them",
            *(split.largest_group, len(split.rows), json.dumps(text, ensure_ascii=False), count),
        )
    if 2 * facts["queries"] < wanted:
        logger.warning(
            "warning: --hold_out %g asks for %d queries, and %d are held out: the other groups are larger",
            *(facts["asked"], wanted, facts["queries"]),
        )


def _queries(
    held: datasets.Dataset, choosing: np.ndarray, by: str, field: str | None
) -> tuple[list[Record], list[bool]]:
    """The rows of QUERIES_FILE: each query once, with the positives of all its rows, and what the first says of it.

    That is its id, group and instruction, and its value of the field that rows were held out by. choosing: for each
    row, whether it is of a group that may choose weights; the same is given for each query.
    """
    chooses: dict[tuple[int, str | None], bool] = {}
    found: dict[tuple[int, str | None], Record] = {}
    answers: dict[tuple[int, str | None], dict[int, str]] = {}
    for row, may_choose in zip(stored_rows(held), choosing.tolist(), strict=True):
        fields = json.loads(row["evaluation_fields"])
        if field is not None:
            fields.setdefault(field, row["field"])
        key = (row["query_id"], row["instruction"])
        found.setdefault(key, {"query": row["query"], "pos": [], **_usable(fields), HELD_OUT_BY: by})
        chooses.setdefault(key, may_choose)
        of_query = answers.setdefault(key, {})
        for number, text in zip(row["pos_ids"], row["pos"]):
            of_query.setdefault(number, text)
    return [{**record, "pos": list(answers[key].values())} for key, record in found.items()], list(chooses.values())


def _usable(fields: Record) -> Record:
    """The fields that evaluation can read: training rows may hold anything under these names."""
    group = fields.get("group")
    if isinstance(group, int | float):
        fields["group"] = str(group)
    elif not isinstance(group, str) or not group.strip():
        fields.pop("group", None)
    return fields


def _with_usable_ids(records: list[Record]) -> list[Record]:
    """The records with their ids where evaluation can read these, else all without."""
    ids = [record.get("id") for record in records]
    names = {str(id_) for id_ in ids if type(id_) in (str, int) and str(id_).split() == [str(id_)]}
    if len(names) == len(records) or not any(id_ is not None for id_ in ids):
        return records
    logger.info(
        '%s has no "id": not every held-out row has one of its own, a whole number or a text without white space',
        QUERIES_FILE,
    )
    return [{name: value for name, value in record.items() if name != "id"} for record in records]


def write_held_out(folder: AnyPath, held_out: HeldOut | None) -> None:
    """Write both files. Where nothing is held out, remove those of an earlier run, which had other rows."""
    queries, candidates = (Path(folder) / name for name in FILES)
    if held_out is not None:
        jsonl.write(queries, held_out.records)
        jsonl.write(candidates, ({"text": text} for text in _all_texts(held_out.task.corpus)))
    elif _is_ours(queries):
        queries.unlink()
        candidates.unlink(missing_ok=True)


def check_held_out_files(folder: AnyPath) -> None:
    """Raise UserError where a file of the user's own has a name of those that are written."""
    queries, candidates = (Path(folder) / name for name in FILES)
    for path in (queries, candidates):
        if path.exists() and not _is_ours(queries):
            raise UserError(
                f"--output_dir {folder}: {path} is no file of an earlier run, and would be replaced; move it"
            )


def _all_texts(corpus: Corpus | Documents) -> Iterator[str]:
    for start in range(0, len(corpus), _TEXTS_PER_READ):
        yield from corpus.texts[start : min(start + _TEXTS_PER_READ, len(corpus))]


def _is_ours(path: Path) -> bool:
    """Whether a run wrote the file: a user's own may have this name."""
    try:
        with path.open(encoding="utf-8") as file:
            return HELD_OUT_BY in json.loads(file.readline())
    except (OSError, ValueError, TypeError):
        return False
