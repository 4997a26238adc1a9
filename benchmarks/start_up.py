"""Seconds from the start of mine_hard_neg.py's process to its first encoded batch.

python benchmarks/start_up.py
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import REPOSITORY, new_parser

PROGRAM = """
import os, sys, time
sys.path.insert(0, {repository!r})
import mine_hard_neg

parse_arguments = mine_hard_neg.parse_arguments

def watched(argv):
    import embedding_finetune.retrieval.encoder  # the import that the run itself makes next
    import embedding_finetune.retrieval.tower as towers
    embed = towers.Tower._embed
    def stop(*args):
        embed(*args)
        print(time.time() - float(os.environ["BEGAN"]), flush=True)
        os._exit(0)
    towers.Tower._embed = stop
    return parse_arguments(argv)

mine_hard_neg.parse_arguments = watched
mine_hard_neg.main({flags!r})
"""


def main() -> None:
    parser = new_parser(__doc__, model=True)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text(
            "".join(json.dumps({"query": f"question {n}", "pos": [f"answer {n}"]}) + "\n" for n in range(20))
        )
        flags = ["--model_name_or_path", args.model, "--input_file", str(rows), "--output_file", f"{folder}/out.jsonl"]
        program = PROGRAM.format(repository=str(REPOSITORY), flags=flags)
        for _ in range(args.rounds):
            environment = {**os.environ, "BEGAN": str(time.time()), "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-c", program]
            result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            seconds.append(float(result.stdout))
    print(f"first batch encoded after {statistics.median(seconds):.2f} s ({min(seconds):.2f} - {max(seconds):.2f})")


if __name__ == "__main__":
    main()
