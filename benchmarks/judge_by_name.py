"""Fill in a file of doubts about Debian's packages as their names would: a simulated judge.

    python evaluate.py ... --doubts_file doubts.jsonl
    python benchmarks/judge_by_name.py doubts.jsonl --output_file judgements.jsonl

A passage answers the synopsis of another package if the two have one name without what tells variants apart: `lib`
before it, versions, and endings such as `-dev`, `-doc` and `-data`. Names are those of the packages that apt knows by
their synopses. It prints how many of the first doubts are real.
"""

import argparse
import re
import subprocess
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from common import DATA, new_parser

from embedding_finetune.command_line import command
from embedding_finetune.data import jsonl
from embedding_finetune.data.records import read_training_rows

ENDINGS = re.compile(
    r"(-?(dev|doc|dbg|dbgsym|data|common|bin|utils|tools|examples|headers|plugins?|extra|gui|cli|server|client|core|base"
    r"|gtk[234]?|qt[456]?|static|shared|source|nox|all|full))+$"
)
VERSIONS = re.compile(r"[-.]?\d[\w.+]*(?=-|$)")
SHORTEST = 3
FIRST = (50, 100, 200, 500, 1000)


@command
def main() -> None:
    args = parse_arguments()
    names = names_by_synopsis()
    synopses = {
        text: row["query"]
        for part in ("train", "test")
        for row in read_training_rows(args.data / f"{part}.jsonl.gz")
        for text in row["pos"]
    }

    def stems(synopsis: str) -> set[str]:
        return {stem for stem in map(stem_of, names.get(synopsis, ())) if len(stem) >= SHORTEST}

    judged = [
        {
            **{field: doubt[field] for field in ("query", "passage")},
            "relevant": bool(stems(doubt["query"]) & stems(synopses[doubt["passage"]])),
        }
        for _, doubt in jsonl.read(args.doubts_file)
    ]
    jsonl.write(args.output_file, judged)
    for count in FIRST:
        if count <= len(judged):
            print(f"of the first {count:4d} doubts {sum(one['relevant'] for one in judged[:count])} are real")


def parse_arguments() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("doubts_file", type=Path, metavar="FILE")
    parser.add_argument("--output_file", type=Path, required=True, metavar="FILE")
    parser.add_argument("--data", type=Path, default=DATA, help="(default: benchmarks/data/debian)")
    return parser.parse_args()


def names_by_synopsis() -> Mapping[str, set[str]]:
    """Synopsis -> the packages that have it, of all that apt knows."""
    available = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    names: dict[str, set[str]] = defaultdict(set)
    for paragraph in available.split("\n\n"):
        name = re.search(r"^Package: (\S+)", paragraph, re.MULTILINE)
        synopsis = re.search(r"^Description(?:-en)?: (.*)", paragraph, re.MULTILINE)
        if name and synopsis:
            names[synopsis[1].strip()].add(name[1])
    return names


def stem_of(name: str) -> str:
    """`libfoo2-dev` and `foo-doc` -> `foo`."""
    return ENDINGS.sub("", VERSIONS.sub("", name.removeprefix("lib")))


if __name__ == "__main__":
    main()
