"""Times spleen-hpc beside libtorch and MONAI and prints the tables for benches/RESULTS.md.

    python benches/peer/run.py [--threads 1 2] [--rounds 3] [--skip-layers] [--raw FILE] > tables.md

Run it with a Python that has torch 2.11, monai 1.6 and nibabel; cargo builds both programs first. The network's rows
come from the program in this folder, which does a run of ours and a run of libtorch's in turn; the others from
processes in turn, ours and MONAI's, --rounds times. Each side warms up before it is timed, process starts excepted. A
figure is the median of all runs of a row (of a round's medians where ours gives only that), a ratio is theirs / ours.
What runs beside it on the machine distorts the figures and, since both sides are in turn, less so the ratios.
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
    """Runs single rows of either side, and keeps what they said."""

    def __init__(self, spleen, peer, inputs, raw):
        self.spleen, self.peer, self.inputs, self.raw = spleen, peer, inputs, raw
        self.env = {**os.environ, "PYTHONWARNINGS": "ignore"}
        self.known = set(output([spleen, "bench", "--list"]).split())

    def keep(self, row):
        if self.raw:
            print(json.dumps(row), file=self.raw, flush=True)

    def ours(self, names, threads):
        """Rows of `spleen-hpc bench` by name; without those that it does not know."""
        known = [name for name in names if name in self.known]
        if not known:
            return {}
        text = output([self.spleen, "bench", "--json", "--threads", threads, "--inputs", self.inputs, "--only", *known])
        rows = {row["name"]: row for row in map(json.loads, text.splitlines())}
        for row in rows.values():
            self.keep({"side": "ours", "threads": threads, **row})
        return rows

    def theirs(self, name, threads):
        """(seconds of the runs, peak MiB) of MONAI."""
        command = [sys.executable, HERE / "monai_side.py", name, "--inputs", self.inputs, "--threads", threads,
                   "--runs", RUNS.get(name, 1)]
        env = {**self.env, "OMP_NUM_THREADS": str(threads)}
        begin = time.perf_counter()
        with subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, text=True, env=env) as process:
            said = json.loads(process.stdout.readline())
            wall = time.perf_counter() - begin
        if name == START:
            said["seconds"] = [wall]
        self.keep({"side": "theirs", "threads": threads, "name": name, **said})
        return said["seconds"], said["peak_rss_mib"]

    def in_turn(self, threads, only):
        """Rows of the network, both sides in one process."""
        command = [self.peer, "--threads", threads, "--only", *only]
        env = {**self.env, "OMP_NUM_THREADS": str(threads)}
        rows = [json.loads(line) for line in output(command, env=env).splitlines()]
        for row in rows:
            self.keep({"side": "both", **row})
        return rows


def number(value, digits=3):
    return "" if value is None else f"{value:.{digits}g}" if value < 100 else f"{value:.0f}"


def ratio(ours, theirs):
    return "" if ours is None or theirs is None else f"{theirs / ours:.2f}"


def median(values):
    return statistics.median(values) if values else None


def table(head, rows):
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def network_rows(runner, threads):
    rows = {row["name"]: row for row in runner.in_turn(threads, [name for _, name, _ in NETWORK])}
    for label, name, aim in NETWORK:
        ours, theirs = (median(rows[name][side]) for side in ("ours", "theirs"))
        yield label, threads, ours, theirs, aim


def scan_rows(runner, threads, rounds):
    """Figures of the scan's rows, and (label, threads, ours, theirs) of the memory of a CT end to end."""
    figures, memory = [], []
    for label, name, variant, aim in SCAN:
        say(f"{label}, {threads} threads")
        ours, theirs, our_peak, their_peak = [], [], [], []
        for _ in range(rounds):
            row = runner.ours([name], threads).get(name)
            if row:
                ours.append(row["seconds_median"])
                our_peak.append(row["peak_rss_mib"])
            seconds, peak = runner.theirs(name + variant, threads)
            theirs += seconds
            their_peak.append(peak)
        figures.append((label, threads, median(ours), median(theirs), aim))
        if name.startswith("infer"):
            memory.append((label, threads, max(our_peak, default=None), max(their_peak)))
    return figures, memory


def layer_rows(runner, threads):
    for row in runner.in_turn(threads, ["layer_"]):
        ours, theirs = median(row["ours"]), median(row["theirs"])
        layer, _, name = row["name"].removeprefix("layer_").rpartition("_")
        speed = [number(row["flop"] / seconds / 1e9) for seconds in (ours, theirs)]
        yield layer, name, number(1e3 * ours), number(1e3 * theirs), ratio(ours, theirs), *speed


def cpu_model():
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side of the rows of a scan")
    parser.add_argument("--skip-layers", action="store_true")
    parser.add_argument("--raw", type=argparse.FileType("w"), help="file for every row as JSON lines")
    args = parser.parse_args()

    spleen, peer = build()
    begin, load = datetime.datetime.now(), os.getloadavg()
    with tempfile.TemporaryDirectory() as inputs:
        runner = Runner(spleen, peer, inputs, args.raw)
        # Makes the inputs, and the network as torch reads it.
        runner.ours([START], max(args.threads))
        output([spleen, "export", f"{inputs}/network.safetensors", "--out", f"{inputs}/network.pt"])
        figures, memory, roofs = [], [], []
        for threads in args.threads:
            say(f"network, {threads} threads")
            roofs.append((threads, runner.ours(["peak_fma_f32", "copy_bandwidth"], threads)))
            figures += network_rows(runner, threads)
            scans, peaks = scan_rows(runner, threads, args.rounds)
            figures += scans
            memory += peaks
        say("layers")
        layers = [] if args.skip_layers else list(layer_rows(runner, max(args.threads)))

    import monai
    import torch
    commit = output(["git", "-C", ROOT, "describe", "--always", "--dirty"]).strip()
    print(f"{begin:%Y-%m-%d %H:%M} to {datetime.datetime.now():%H:%M}, {cpu_model()}, {os.cpu_count()} cores; load average "
          f"{load[0]:.1f} before, {os.getloadavg()[0]:.1f} at the end. spleen-hpc {commit}, torch {torch.__version__}, "
          f"monai {monai.__version__}. `python {' '.join([os.path.relpath(__file__, ROOT), *sys.argv[1:]])}`\n")
    for threads, rows in roofs:
        print(f"{threads} threads: {rows['peak_fma_f32']['gflops']:.0f} GFLOP/s f32 FMA, "
              f"{rows['copy_bandwidth']['gbytes_per_second']:.1f} GB/s copy (read + written).\n")
    table(["work", "threads", "ours, s", "theirs, s", "theirs / ours", "aim"],
          [[label, str(threads), number(ours), number(theirs), ratio(ours, theirs), f"≥ {aim:g}" if aim else ""]
           for label, threads, ours, theirs, aim in sorted(figures, key=lambda f: f[1])])
    table(["peak memory", "threads", "ours, MiB", "theirs, MiB", "theirs / ours", "aim"],
          [[label, str(threads), number(ours), number(theirs), ratio(ours, theirs), "≥ 2"]
           for label, threads, ours, theirs in memory])
    if layers:
        print(f"Each convolution by itself, 4 patches of 96^3, f32, {max(args.threads)} threads:\n")
        table(["layer", "pass", "ours, ms", "theirs, ms", "theirs / ours", "ours, GFLOP/s", "theirs, GFLOP/s"], layers)


if __name__ == "__main__":
    main()
