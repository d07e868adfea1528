#!/usr/bin/env python3
"""What ksnap costs: a snapshot of 100 datasets against one bare ``zfs snapshot`` of the same, and how its functions
slow down as datasets and snapshots become more. All in one run, in turn, on one machine.

In a virtual machine of the tests' machine room, made for it:

    sudo bench/ksnap.py

On this machine and a disk, whose content is lost, in Salt's Python, with the modules synchronised (saltutil.sync_all):

    bench/ksnap.py --here /dev/disk/by-id/...
"""

import argparse
import statistics
import subprocess
import sys
import time

import machine
from figures import spread, steps

GRID = "1x1h(keep=all) | 24x1h | 14x1d"
processes = []  # what was run, and the seconds it took


def zfs(*words):
    subprocess.run(["zfs", *words], check=True, stdout=subprocess.DEVNULL)


def timed(function, *arguments, **options):
    """Return the seconds it took, the number of programs it ran, and what it returned."""
    processes.clear()
    begin = time.perf_counter()
    result = function(*arguments, **options)
    return time.perf_counter() - begin, len(processes), result


def count_processes():
    real = subprocess.run

    def counted(argv, **options):
        begin = time.perf_counter()
        done = real(argv, **options)
        processes.append((argv[1], time.perf_counter() - begin))
        return done

    subprocess.run = counted


def against_the_bare_command(modules, stack, names, turns):
    ours, bare = [], []
    for turn in range(turns):
        taken = [f"{name}@bare{turn}" for name in names]
        bare.append(timed(zfs, "snapshot", *taken)[0])
        seconds, ran, done = timed(modules["ksnap.snapshot"], stack)
        assert len(done["datasets"]) == len(names)
        ours.append(seconds)
    ratios = [mine / its for mine, its in zip(ours, bare, strict=True)]
    print(f"\nA snapshot of {len(names)} datasets, median of {turns} turns")
    print(f"one bare zfs snapshot  {spread(bare)} s")
    print(f"ksnap.snapshot         {spread(ours)} s, {ran} processes")
    print(f"of which               {', '.join(f'{word} {seconds:.2f} s' for word, seconds in processes)}")
    print(f"times as long          {spread(ratios)}")


def growth(modules, what, sizes, grow, stack, turns):
    """Measure at each of the ``sizes``, after ``grow(size)``."""
    bare = {
        "zfs list": lambda: zfs("list", "-H", "-p", "-r", "-t", "all", "-o", "name,used,guid", "bench/d"),
        "zfs snapshot -r": lambda: zfs("snapshot", "-r", f"bench/d@bare-{time.monotonic_ns()}"),
    }
    calls = {
        **bare,
        "ksnap.list": lambda: modules["ksnap.list"](stack),
        "ksnap.prune, dry run": lambda: modules["ksnap.prune"](stack, GRID, test=True),
        "ksnap.snapshot": lambda: modules["ksnap.snapshot"](stack),
    }
    found = {name: [] for name in calls}
    for size in sizes:
        grow(size)
        print(f"\nwith {size} {what}", end="", flush=True)
        for name, call in calls.items():
            runs = [timed(call)[:2] for _ in range(turns)]
            found[name].append((statistics.median(run[0] for run in runs), runs[-1][1]))
            print(f", {name} {found[name][-1][0]:.2f} s", end="", flush=True)
    print(f"\n\nGrowth with {what}, median of {turns} turns; in brackets the processes")
    print(f"{'':22}" + "".join(f"{size:>15}" for size in sizes) + "    against linear, step by step")
    worst = allowed = 0
    for name, row in found.items():
        slower = steps(sizes, [seconds for seconds, _ in row])
        if name in bare:
            # What the pool itself takes is not ksnap's: a machine with little memory reads all from its disk again.
            allowed = max([allowed, 1, *slower])
        else:
            worst = max([worst, *(step / allowed for step in slower)])
        cells = "".join(f"{seconds:>9.2f} s ({ran:>2})" for seconds, ran in row)
        print(f"{name:22}{cells}    {', '.join(f'{step:.2f}' for step in slower)}", flush=True)
    return worst


def here(arguments):
    count_processes()
    modules = machine.salt_modules()
    print("Salt is loaded", flush=True)
    subprocess.run(["zpool", "create", "-f", "-O", "canmount=off", "bench", arguments.here], check=True)
    there = []

    def begin():
        if there:
            zfs("destroy", "-r", "bench/d")
            there.clear()
        zfs("create", "bench/d")

    def more_datasets(number):
        while len(there) < number:
            there.append(f"bench/d/{len(there):04}")
            zfs("create", there[-1])

    sets = 0

    def more_sets(number):
        nonlocal sets
        while sets < number:
            name = modules["ksnap.new_name"]()
            says = f"ksnap:count={len(there) + 1}", "ksnap:stack=-", "ksnap:who=bench"
            words = [word for each in says for word in ("-o", each)]
            zfs("snapshot", *words, *(f"{each}@{name}" for each in ["bench/d", *there]))
            sets += 1

    try:
        stack = {"datasets": ["bench/d"], "children": True}
        begin()
        more_datasets(99)
        against_the_bare_command(modules, stack, ["bench/d", *there], arguments.turns)
        begin()
        turns, sizes = arguments.growth_turns, arguments.datasets
        worst = [growth(modules, "datasets", sizes, lambda size: more_datasets(size - 1), stack, turns)]
        begin()
        more_datasets(99)
        sizes = [100 * each for each in arguments.sets]
        worst.append(growth(modules, "snapshots", sizes, lambda size: more_sets(size // 100), stack, turns))
    finally:
        subprocess.run(["zpool", "destroy", "-f", "bench"], check=True)
    # What is measured wavers, and a machine's caches have an end.
    linear = max(worst) <= 1.2
    said = f"linear, or better, or no worse than the bare commands (worst step: {max(worst):.2f} times that)"
    print(f"\n{'reached' if linear else 'MISSED '}  {said}")
    return 0 if linear else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", metavar="DISK", help="measure on this machine, with a pool on this disk")
    parser.add_argument("--release", default="trixie", help="of the virtual machine (default: trixie)")
    parser.add_argument("--turns", type=int, default=5, help="against the bare command (default: 5)")
    parser.add_argument("--growth-turns", type=int, default=2, help="at each size (default: 2)")
    parser.add_argument("--datasets", type=int, nargs="+", default=[10, 100, 500])
    parser.add_argument("--sets", type=int, nargs="+", default=[10, 100], help="snapshots, each of 100 datasets")
    arguments = parser.parse_args()
    if arguments.here:
        return here(arguments)
    words = [f"--turns={arguments.turns}", f"--growth-turns={arguments.growth_turns}"]
    words += ["--datasets", *map(str, arguments.datasets), "--sets", *map(str, arguments.sets)]
    return machine.run(arguments.release, 1, words)


if __name__ == "__main__":
    sys.exit(main())
