"""Prints the cost of a forward pass and of a training step against patch volume, batch and channels, as a Markdown table.

    python3 benches/scaling.py [--threads N] [--rounds 3] [--only PATTERN ..] [--raw FILE] > tables.md
    python3 benches/scaling.py --render FILE > tables.md

Times the rows scale_* of `spleen-hpc bench` (cargo builds it first), --rounds times one after another. Seconds are the
median of the rounds' medians. The cost is seconds a GFLOP, over that of the bundle's network on one patch of 96^3 in the
same round: 1 or less is work that grows no faster than its FLOP. It stands twice, of medians and of the fastest runs,
whose difference is what else the machine did.
"""

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"scale_(?P<work>[a-z]+)_b(?P<batch>\d+)_(?P<side>\d+)_c(?P<channels>\d+)_(?P<dtype>\w+)")
BASE = {"batch": 1, "side": 96, "channels": 16}
WORK = {"forward": "Forward pass", "step": "Training step"}


def output(*command):
    """Standard output of a command that must succeed."""
    return subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


def measure(args):
    """Rows with their round, and what to know about the run."""
    output("cargo", "build", "--release", "--bin", "spleen-hpc")
    described = json.loads(output("cargo", "metadata", "--format-version", 1, "--no-deps"))
    program = Path(described["target_directory"]) / "release" / "spleen-hpc"
    begin, load = datetime.datetime.now(), os.getloadavg()
    rows = []
    for number in range(args.rounds):
        said = output(program, "bench", "--json", "--threads", args.threads, "--only", *args.only)
        rows += [{**json.loads(line), "round": number} for line in said.splitlines()]
    end = datetime.datetime.now()
    version = output(program, "--version").split("(")[-1].strip(" )\n")
    about = (f"{begin:%Y-%m-%d %H:%M} to {end:%H:%M}, {args.threads or os.cpu_count()} threads; load average "
             f"{load[0]:.1f} before. spleen-hpc {version}, {args.rounds} rounds of `benches/scaling.py`.")
    return [{"about": about}, *rows]


def cost(row, seconds):
    """Seconds a GFLOP."""
    return row[seconds] / (row["gflops"] * row["seconds_median"])


def line(rows, bases):
    """A size's line, of its rows and the base's by round."""
    median = statistics.median
    size = rows[0]["size"]
    costs = [median(cost(row, which) / cost(bases[row["round"]], which) for row in rows if row["round"] in bases)
             if bases else float("nan") for which in ("seconds_median", "seconds_min")]
    work = rows[0]["gflops"] * rows[0]["seconds_median"]
    seconds, peak = median(row["seconds_median"] for row in rows), max(row["peak_rss_mib"] or 0 for row in rows)
    return [f"{size['side']}^3", size["batch"], size["channels"], f"{work:.3g}", f"{seconds:.3g}",
            f"{work / seconds:.0f}", *(f"{value:.2f}" for value in costs), f"{peak:.0f}"]


def render(rows):
    """Prints a table for each kind of work and operands."""
    groups = {}
    for row in rows:
        found = NAME.fullmatch(row.get("name", ""))
        if "about" in row:
            print(row["about"] + "\n")
        elif found:
            row["size"] = {key: int(found[key]) for key in BASE}
            groups.setdefault((found["work"], found["dtype"]), {}).setdefault(row["name"], []).append(row)
    for (work, dtype), by_name in groups.items():
        print(f"{WORK[work]}, {dtype}\n")
        head = ["patch", "batch", "channels", "GFLOP", "s", "GFLOP/s", "cost", "of the fastest", "peak, MiB"]
        print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
        bases = {row["round"]: row for rows in by_name.values() for row in rows if row["size"] == BASE}
        for rows in by_name.values():
            print("| " + " | ".join(map(str, line(rows, bases))) + " |")
        print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0, help="0 means one a core")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["scale_*"], help="some of the rows, such as 'scale_*_f32'")
    parser.add_argument("--raw", type=argparse.FileType("w"), help="file for every row as JSON lines")
    parser.add_argument("--render", type=argparse.FileType(), help="print the tables of such a file, time nothing")
    args = parser.parse_args()
    rows = [json.loads(text) for text in args.render] if args.render else measure(args)
    if args.raw:
        args.raw.writelines(json.dumps(row) + "\n" for row in rows)
    render(rows)


if __name__ == "__main__":
    main()
