#!/usr/bin/env python3
"""What zfs_dr costs: many small changed datasets against syncoid and against a bare ``zfs send | zfs receive`` of each,
few large ones against the bare pipe, and a replication that has nothing to do against one ``zfs list``; and how both
slow down as datasets and snapshots become more. All in one run, in turn, on one machine, from one pool to another.

In a virtual machine of the tests' machine room, made for it:

    sudo bench/zfs_dr.py

On this machine and two disks, whose content is lost, in Salt's Python, with the modules synchronised
(saltutil.sync_all) and sanoid installed:

    bench/zfs_dr.py --here /dev/disk/by-id/... /dev/disk/by-id/...
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import machine
from figures import spread, steps

# What is to be reached: how many times as fast as the other, or how many times as long.
GOALS = {"syncoid": 3.0, "pipe": 0.95, "list": 1.5}


def run(*argv):
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def timed(function, *arguments):
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


def write(names, size):
    for name in names:
        with open(f"/{name}/file", "wb") as file:
            for _ in range(size >> 14):
                file.write(os.urandom(1 << 14))


def pipe(source, target, before, now):
    """Send one dataset, from ``before`` on, as one would at the shell."""
    base = ["-i", f"@{before}"] if before else []
    sending = subprocess.Popen(["zfs", "send", "-Lec", *base, f"{source}@{now}"], stdout=subprocess.PIPE)
    run_ = subprocess.run(["zfs", "receive", "-u", target], stdin=sending.stdout, check=True)
    sending.stdout.close()
    assert sending.wait() == 0 and run_.returncode == 0


class Bench:
    """One stack with three targets: ours, syncoid's, and the bare pipe's."""

    def __init__(self, modules, name, number):
        self.modules, self.top = modules, f"tank/{name}"
        self.target = {"name": name, "dataset": f"backup/{name}-dr"}
        self.stack = {"name": name, "datasets": [self.top], "children": True}
        run("zfs", "create", self.top)
        self.names = [f"{self.top}/{each:04}" for each in range(number)]
        for each in self.names:
            run("zfs", "create", each)
        for each in ("dr", "bare"):
            run("zfs", "create", "-o", "mountpoint=none", "-o", "canmount=off", f"backup/{name}-{each}")
        self.name, self.before = name, None

    def take(self):
        self.now = self.modules["ksnap.snapshot"](self.stack)["snapshot"]

    def ours(self):
        done = self.modules["zfs_dr.replicate"](self.stack, self.target)
        assert done["snapshot"] == self.now and len(done["datasets"]) == len(self.names) + 1

    def syncoid(self):
        run("syncoid", "--quiet", "--recursive", "--no-sync-snap", "--no-privilege-elevation", "--sendoptions=Lec",
            self.top, f"backup/{self.name}-syncoid")  # fmt: skip

    def bare(self):
        for each in [self.top, *self.names]:
            pipe(each, f"backup/{self.name}-bare/{each.replace('/', ':')}", self.before, self.now)


def compare(bench, size, turns, ways):
    """Return the seconds of each way at each turn; the first, of everything in full, does not count."""
    seconds = {way: [] for way in ways}
    for turn in range(turns + 1):
        write(bench.names, size)
        bench.take()
        # Whoever comes first finds the caches cold.
        for way in [*ways[turn % len(ways) :], *ways[: turn % len(ways)]]:
            run("zpool", "sync")
            spent = timed(getattr(bench, way))
            if turn:
                seconds[way].append(spent)
        bench.before = bench.now
        print(".", end="", flush=True)
    return seconds


def told(title, seconds, times, goals):
    """Print what was measured; return whether each of the ``goals``, way to ratio, was reached."""
    print(f"\n{title}")
    for way, values in seconds.items():
        print(f"{way:28}{spread(values)} s")
    reached = True
    for way, (goal, least) in goals.items():
        ratios = [one / other for one, other in zip(*times(way), strict=True)]
        median = statistics.median(ratios)
        good = median >= goal if least else median <= goal
        reached = reached and good
        print(f"{'reached' if good else 'MISSED '} {way:20}{spread(ratios)} times; goal: {goal}")
    return reached


def small(modules, arguments):
    bench = Bench(modules, "small", arguments.small)
    seconds = compare(bench, 1 << 14, arguments.turns, ["ours", "syncoid", "bare"])
    good = told(
        f"{arguments.small} small datasets, all changed",
        seconds,
        lambda way: (seconds[way], seconds["ours"]),
        {"syncoid": (GOALS["syncoid"], True)},
    )
    idle = {"ours": [], "zfs list": []}
    for _ in range(2 * arguments.turns + 1):
        idle["ours"].append(timed(bench.ours))
        idle["zfs list"].append(timed(run, "zfs", "list", "-H", "-p", "-r", bench.top))
    idly = told(
        f"{arguments.small} datasets, nothing to do",
        idle,
        lambda way: (idle["ours"], idle[way]),
        {"zfs list": (GOALS["list"], False)},
    )
    return good and idly


def large(modules, arguments):
    spent = compare(Bench(modules, "large", 4), arguments.large << 20, arguments.turns, ["ours", "bare"])
    return told(
        f"4 datasets with {arguments.large} MiB of changes each",
        spent,
        lambda way: (spent[way], spent["ours"]),
        {"bare": (GOALS["pipe"], True)},
    )


def datasets(modules, arguments):
    sizes = arguments.datasets
    makes = [lambda number=number: Bench(modules, f"of{number}", number) for number in sizes]
    return grown("datasets", sizes, makes, arguments.turns)


def snapshots(modules, arguments):
    bench, made = Bench(modules, "old", 10), 0

    def older(number):
        nonlocal made
        while made < number:
            made += 1
            for top in (bench.top, bench.target["dataset"]):
                run("zfs", "snapshot", "-r", f"{top}@old-{made}")
        return bench

    makes = [lambda number=number: older(number) for number in arguments.sets]
    return grown("snapshots on each side", [11 * number for number in arguments.sets], makes, arguments.turns)


def grown(what, sizes, makes, turns):
    """Return whether nothing slows down more than there are more of them, or than the bare pipe does."""
    found = {"all changed": [], "nothing to do": [], "bare": []}
    for make in makes:
        bench = make()
        seconds = compare(bench, 1 << 14, turns, ["ours", "bare"])
        found["all changed"].append(statistics.median(seconds["ours"]))
        found["nothing to do"].append(statistics.median(timed(bench.ours) for _ in range(turns)))
        found["bare"].append(statistics.median(seconds["bare"]))
    print(f"\nGrowth with {what}: {', '.join(map(str, sizes))}")
    # What the pool itself takes longer is not ours.
    allowed = [max(1, step) for step in steps(sizes, found["bare"])]
    worst = 0
    for name, values in found.items():
        slower = steps(sizes, values)
        worst = max([worst, *(step / most for step, most in zip(slower, allowed, strict=True))])
        shown = ", ".join(f"{seconds:.2f} s" for seconds in values)
        print(f"{name:28}{shown}; against linear {', '.join(f'{step:.2f}' for step in slower)}")
    # What is measured wavers.
    print(f"{'reached' if worst <= 1.1 else 'MISSED '} linear, or better, or no worse than the bare pipe", flush=True)
    return worst <= 1.1


PARTS = {"small": small, "large": large, "datasets": datasets, "snapshots": snapshots}


def here(arguments):
    modules = machine.salt_modules()
    good = []
    for part in arguments.parts:
        try:
            for pool, disk in zip(("tank", "backup"), arguments.here, strict=True):
                run("zpool", "create", "-f", pool, disk)
            good.append(PARTS[part](modules, arguments))
        finally:
            for pool in ("tank", "backup"):
                subprocess.run(["zpool", "destroy", "-f", pool], check=False)
    return 0 if all(good) else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", metavar="DISK", nargs=2, help="measure on this machine, with pools on these disks")
    parser.add_argument("--release", default="trixie", help="of the virtual machine (default: trixie)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of the whole (default: all)")
    parser.add_argument("--turns", type=int, default=3, help="of each comparison (default: 3)")
    parser.add_argument("--small", type=int, default=100, help="how many small datasets (default: 100)")
    parser.add_argument("--large", type=int, default=384, help="MiB that change in a large one (default: 384)")
    parser.add_argument("--datasets", type=int, nargs="+", default=[10, 100, 500], help="growth: how many datasets")
    parser.add_argument("--sets", type=int, nargs="+", default=[100, 1000], help="growth: old sets of ten datasets")
    arguments = parser.parse_args()
    if arguments.here:
        return here(arguments)
    words = [f"--{key}={getattr(arguments, key)}" for key in ("turns", "small", "large")]
    words += ["--parts", *arguments.parts]
    words += ["--datasets", *map(str, arguments.datasets), "--sets", *map(str, arguments.sets)]
    return machine.run(arguments.release, 2, words)


if __name__ == "__main__":
    sys.exit(main())
