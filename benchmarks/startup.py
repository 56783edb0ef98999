"""How long do `import gaternet` and `gaternet --help` take, beside `import timm`?

python benchmarks/startup.py [--runs 5] [--out docs/results/startup.json]

Whole processes, in turn, after one warm-up each; medians.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gaternet.files import write_json
from gaternet.provenance import describe_machine

COMMANDS = {
    "import gaternet": ["-c", "import gaternet"],
    "import gaternet.train": ["-c", "import gaternet.train"],
    "import gaternet, its models": ["-c", "import gaternet; gaternet.create_model"],
    "import timm": ["-c", "import timm"],
    "gaternet --help": ["-m", "gaternet", "--help"],
}


def main() -> None:
    """Measure, print one table, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/results/startup.json"))
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round_ in range(args.runs + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            if round_:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {"runs": args.runs, "seconds": medians, **describe_machine(), "command": "python benchmarks/startup.py"}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    table = Table("command", "seconds", title=f"whole process, median of {args.runs}")
    for name, value in medians.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
