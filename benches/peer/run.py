"""Times spleen-hpc beside libtorch and MONAI and prints the tables for benches/RESULTS.md.

    python benches/peer/run.py [--threads 1 2] [--rounds 3] [--only NAME ..] [--programs OURS PEER] [--raw FILE] > tables.md
    python benches/peer/run.py --render FILE > tables.md

Run it with a Python that has torch 2.11, monai 1.6 and nibabel; cargo builds both programs first. The network's rows
come from the program in this folder, which does a run of ours and a run of libtorch's in turn; the others from
processes in turn, ours and MONAI's, --rounds times. Each side warms up before it is timed, process starts excepted. A
figure is the median of all runs of a row (of the rounds' medians where ours gives only those), a ratio is theirs / ours.
What runs beside it on the machine distorts the figures and, since both sides are in turn, less so the ratios; libtorch's
threads wait for each other at every op and suffer more from it, so the ratio of the fastest runs stands beside. On a
busy machine only the ratio of CPU times can be trusted; the network's rows have it with one thread.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# Row of the table, its name on both sides, least ratio aimed at.
NETWORK = [
    ("forward, 4 x 96^3, f32", "forward_b4_96_f32", 2.5),
    ("forward, 4 x 96^3, bf16", "forward_b4_96_bf16", 4.0),
    ("training step, 2 x 96^3, f32", "step_b2_96_f32", 2.5),
    ("training step, 2 x 96^3, bf16", "step_b2_96_bf16", 2.5),
]
# The same, with what is added to the name on their side.
SCAN = [
    ("sliding window, 256x256x128, f32", "sliding_window_256x256x128_f32", "", 2.5),
    ("sliding window, 256x256x128, bf16", "sliding_window_256x256x128_bf16", "", 4.0),
    ("preprocessing, 512x512x90, image only", "preprocess_512x512x90", "", 4.0),
    ("softmax to mask on disk", "postprocess_512x512x90", "", 15.0),
    ("the same, theirs with torch.argmax", "postprocess_512x512x90", "_torch_argmax", None),
    ("a CT end to end, f32", "infer_512x512x90_f32", "", 4.5),
    ("a CT end to end, bf16", "infer_512x512x90_bf16", "", 6.5),
    ("process start to first window", "start_to_first_window", "", 20.0),
]
START = "start_to_first_window"
PEAKS = {"f32": "peak_fma_f32", "bf16": "peak_bf16"}
COPY = "copy_bandwidth"
# Timed runs of MONAI's side in a round; long ones are left to the rounds.
RUNS = {"preprocess_512x512x90": 3, "postprocess_512x512x90": 5}


def say(text):
    print(text, file=sys.stderr, flush=True)


def output(command, **more):
    """Standard output of a command that must succeed."""
    return subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE, text=True, **more).stdout


def target_folder(manifest):
    described = output(["cargo", "metadata", "--format-version", 1, "--no-deps", "--manifest-path", manifest])
    return Path(json.loads(described)["target_directory"]) / "release"


def build():
    """Paths of both programs, built."""
    env = {**os.environ, "LIBTORCH_USE_PYTORCH": "1", "VIRTUAL_ENV": sys.prefix,
           "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    programs = []
    for manifest, program in [(ROOT / "Cargo.toml", "spleen-hpc"), (HERE / "Cargo.toml", "spleen-hpc-peer")]:
        output(["cargo", "build", "--release", "--manifest-path", manifest, "--bin", program], env=env)
        programs.append(target_folder(manifest) / program)
    return programs


class Runner:
    """Runs single rows of either side; `rows` is what they said."""

    def __init__(self, spleen, peer, inputs, raw):
        self.spleen, self.peer, self.inputs, self.raw = spleen, peer, inputs, raw
        self.env = {**os.environ, "PYTHONWARNINGS": "ignore"}
        self.known = set(output([spleen, "bench", "--list"]).split())
        self.rows = []

    def keep(self, **row):
        self.rows.append(row)
        if self.raw:
            print(json.dumps(row), file=self.raw, flush=True)

    def ours(self, names, threads):
        """Rows of `spleen-hpc bench` by name; those that it does not know are left out."""
        names = [name for name in names if name in self.known]
        if names:
            command = [self.spleen, "bench", "--json", "--threads", threads, "--inputs", self.inputs, "--only", *names]
            for line in output(command).splitlines():
                self.keep(side="ours", threads=threads, **json.loads(line))

    def theirs(self, name, threads):
        """A row of MONAI."""
        command = [sys.executable, HERE / "monai_side.py", name, "--inputs", self.inputs, "--threads", threads,
                   "--runs", RUNS.get(name, 1)]
        env = {**self.env, "OMP_NUM_THREADS": str(threads)}
        begin = time.perf_counter()
        with subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, text=True, env=env) as process:
            said = json.loads(process.stdout.readline())
            wall = time.perf_counter() - begin
        if name == START:
            said["seconds"] = [wall]
        self.keep(side="theirs", threads=threads, name=name, **said)

    def in_turn(self, threads, only):
        """Rows of the network, both sides in one process."""
        env = {**self.env, "OMP_NUM_THREADS": str(threads)}
        for line in output([self.peer, "--threads", threads, "--only", *only], env=env).splitlines():
            self.keep(side="both", **json.loads(line))


def measure(args):
    """All rows, and what to know about the run."""
    def wanted(name):
        return not args.only or any(name.startswith(only) for only in args.only)

    spleen, peer = [program.resolve() for program in args.programs] if args.programs else build()
    begin, load = datetime.datetime.now(), os.getloadavg()
    with tempfile.TemporaryDirectory() as inputs:
        runner = Runner(spleen, peer, inputs, args.raw)
        say("inputs")
        output([spleen, "bench", "--json", "--only", START, "--inputs", inputs])
        output([spleen, "export", f"{inputs}/network.safetensors", "--out", f"{inputs}/network.pt"])
        for threads in args.threads:
            say(f"network, {threads} threads")
            runner.ours([*PEAKS.values(), COPY], threads)
            network = [name for _, name, _ in NETWORK if wanted(name)]
            if network:
                runner.in_turn(threads, network)
            for label, name, variant, _ in filter(lambda row: wanted(row[1]), SCAN):
                say(f"{label}, {threads} threads")
                for _ in range(args.rounds):
                    if not variant:
                        runner.ours([name], threads)
                    runner.theirs(name + variant, threads)
            layers = [only for only in args.only or ["layer_"] if only.startswith("layer_")]
            if layers:
                say(f"layers, {threads} threads")
                runner.in_turn(threads, layers)
    import monai
    import torch
    version = output([spleen, "--version"]).strip()
    if not args.programs and output(["git", "-C", ROOT, "status", "--porcelain", "--untracked-files=no"]):
        version += ", changed since"
    # Where files lay is nobody's business but ours.
    said = sys.argv[1:]
    for option, values in [("--raw", 1), ("--programs", 2)]:
        if option in said:
            at = said.index(option)
            del said[at:at + 1 + values]
    command = " ".join([os.path.relpath(__file__, ROOT), *said])
    runner.keep(side="about", text=(
        f"{begin:%Y-%m-%d %H:%M} to {datetime.datetime.now():%H:%M}, {cpu_model()}, {os.cpu_count()} cores; load average "
        f"{load[0]:.1f} before, {os.getloadavg()[0]:.1f} at the end (2 of it would be ours). {version}, torch "
        f"{torch.__version__}, monai {monai.__version__}. `python {command}`"))
    return runner.rows


def cpu_model():
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


class Figures:
    """Medians, minima and peaks of one side, by row and threads."""

    def __init__(self, rows, side):
        self.median, self.min, self.peak, self.cpu = {}, {}, {}, {}
        middles = {}
        for row in rows:
            seconds = row.get(side) if row["side"] == "both" else row.get("seconds")
            if row["side"] == side and "seconds_median" in row:
                middle, least = [row["seconds_median"]], row["seconds_min"]
            elif row["side"] in (side, "both") and seconds:
                middle, least = seconds, min(seconds)
            else:
                continue
            key = (row["name"], row["threads"])
            middles.setdefault(key, []).extend(middle)
            # Threads that wait burn CPU time, too: it means something where there is only one.
            if row.get(f"{side}_cpu") and row["threads"] == 1:
                self.cpu[key] = statistics.median(row[f"{side}_cpu"])
            self.min[key] = min(least, self.min.get(key, least))
            self.peak[key] = max(row.get("peak_rss_mib") or 0, self.peak.get(key, 0))
        self.median = {key: statistics.median(values) for key, values in middles.items()}


def number(value):
    return "" if not value else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(ours, theirs):
    return f"{theirs / ours:.2f}" if ours and theirs else ""


def percent(share):
    return f"{100 * share:.0f} %" if share else ""


def shares(rows, roofs, name, threads):
    """What a row of ours reaches of the peak of its operands and of the roofline, where each convolution takes the longer
    of its FLOP at that peak and its bytes at the speed of the copy."""
    found = [row for row in rows if row.get("name") == name and row.get("threads") == threads and row["side"] != "theirs"]
    known = [(row["share_of_peak"], row["share_of_roofline"]) for row in found if row.get("share_of_roofline")]
    peak = roofs.get((PEAKS.get(name.rpartition("_")[2], PEAKS["f32"]), threads))
    copy = roofs.get((COPY, threads))
    for row in found:
        if row.get("costs") and row.get("ours") and peak and copy:
            flops, bandwidth = 1e9 * peak["gflops"], 1e9 * copy["gbytes_per_second"]
            seconds = statistics.median(row["ours"])
            known.append((sum(flop for flop, _ in row["costs"]) / flops / seconds,
                          sum(max(flop / flops, size / bandwidth) for flop, size in row["costs"]) / seconds))
    return [statistics.median(column) for column in zip(*known)] or [None, None]


def table(head, rows):
    if not rows:
        return
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def render(rows):
    """Prints the tables."""
    ours, theirs = Figures(rows, "ours"), Figures(rows, "theirs")
    threads = sorted({row["threads"] for row in rows if "threads" in row})
    roofs = {(row["name"], row["threads"]): row for row in rows if row.get("name") in (*PEAKS.values(), COPY)}
    for row in rows:
        if row["side"] == "about":
            print(row["text"] + "\n")
    for n in threads:
        peaks = [f"{roofs[name, n]['gflops']:.0f} GFLOP/s {dtype}" for dtype, name in PEAKS.items() if (name, n) in roofs]
        copy = [f"{roofs[COPY, n]['gbytes_per_second']:.1f} GB/s copy (read and written)"] if (COPY, n) in roofs else []
        print(f"Threads: {n}; at best {', '.join(peaks + copy)}.\n")

    def pair(figures, name, variant, n):
        return getattr(ours, figures).get((name, n)), getattr(theirs, figures).get((name + variant, n))

    work = [(label, name, "", aim) for label, name, aim in NETWORK] + SCAN
    lines = [(label, name, variant, n, aim) for n in threads for label, name, variant, aim in work
             if any(pair("median", name, variant, n))]
    table(["work", "threads", "ours, s", "theirs, s", "theirs / ours", "of the fastest", "of CPU time", "aim",
           "ours, of peak", "of roofline"],
          [[label, str(n), *map(number, pair("median", name, variant, n)), ratio(*pair("median", name, variant, n)),
            ratio(*pair("min", name, variant, n)), ratio(*pair("cpu", name, variant, n)), f"≥ {aim:g}" if aim else "",
            *map(percent, shares(rows, roofs, name, n))]
           for label, name, variant, n, aim in lines])
    table(["peak memory", "threads", "ours, MiB", "theirs, MiB", "theirs / ours", "aim"],
          [[label, str(n), *map(number, pair("peak", name, "", n)), ratio(*pair("peak", name, "", n)), "≥ 2"]
           for label, name, _, n, _ in lines if name.startswith("infer")])
    for n in threads:
        layers = [row for row in rows if row.get("name", "").startswith("layer_") and row["threads"] == n]
        if layers:
            print(f"Each convolution by itself, 4 patches of 96^3, f32; threads: {n}\n")
            table(["layer", "pass", "ours, ms", "theirs, ms", "theirs / ours", "of the fastest", "of CPU time",
                   "ours, of peak", "of roofline"],
                  [layer(row, pair) + [*map(percent, shares(rows, roofs, row["name"], n))] for row in layers])


def layer(row, pair):
    """A line of the table of layers."""
    name, _, which = row["name"].removeprefix("layer_").rpartition("_")
    medians, least, cpu = (pair(figures, row["name"], "", row["threads"]) for figures in ("median", "min", "cpu"))
    return [name, which, *(number(1e3 * seconds) for seconds in medians), ratio(*medians), ratio(*least), ratio(*cpu)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side of the rows of a scan")
    parser.add_argument("--only", nargs="+", help="beginnings of names of rows, such as step_ or layer_")
    parser.add_argument("--programs", type=Path, nargs=2, metavar=("OURS", "PEER"),
                        help="spleen-hpc and spleen-hpc-peer, built elsewhere; libtorch must be on LD_LIBRARY_PATH")
    parser.add_argument("--raw", type=argparse.FileType("w"), help="file for every row as JSON lines")
    parser.add_argument("--render", type=argparse.FileType(), help="print the tables of such a file, time nothing")
    args = parser.parse_args()
    render([json.loads(line) for line in args.render] if args.render else measure(args))


if __name__ == "__main__":
    main()
