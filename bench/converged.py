#!/usr/bin/env python3
"""What a state.apply of xmpp costs on a machine where nothing is to be done, against one of an empty SLS.

Run it as root on a machine that bootstrap has set up: bench/converged.py [--runs 7] [--config-dir /etc/salt/xmpp]
The two are run in turn, so that a machine that slows down slows both.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path


def apply(salt_call, sls):
    began = time.monotonic()
    done = subprocess.run([*salt_call, "state.apply", sls, "--out=json"], capture_output=True, text=True)
    seconds = time.monotonic() - began
    if done.returncode:
        sys.exit(f"state.apply {sls} failed:\n{done.stdout}{done.stderr}")
    return seconds, json.loads(done.stdout)["local"]


def spread(values):
    return f"{statistics.median(values):6.2f} s   ({min(values):.2f} to {max(values):.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--config-dir", default="/etc/salt/xmpp")
    arguments = parser.parse_args()
    own = Path("/opt/salt-xmpp/bin/salt-call")
    program = str(own) if own.exists() else shutil.which("salt-call")
    salt_call = [program, f"--config-dir={arguments.config_dir}"]

    empty, full, ratios, cost = [], [], [], Counter()
    apply(salt_call, "bench.empty"), apply(salt_call, "xmpp")
    for _ in range(arguments.runs):
        empty.append(apply(salt_call, "bench.empty")[0])
        seconds, states = apply(salt_call, "xmpp")
        full.append(seconds)
        ratios.append(seconds / empty[-1])
        for identifier, state in states.items():
            if state["changes"]:
                sys.exit(f"Not converged: {state['__id__']} changed {state['changes']}")
            kind = identifier.split("_|-")
            cost[f"{kind[0]}.{kind[-1]}"] += state["duration"] / arguments.runs
    print(f"empty state.apply      {spread(empty)}")
    print(f"state.apply xmpp       {spread(full)}   {len(states)} states")
    print(f"ratio, run by run      {statistics.median(ratios):6.2f}     ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"inside the states      {sum(cost.values()) / 1000:6.2f} s, of which")
    for kind, milliseconds in cost.most_common(12):
        print(f"  {kind:32} {milliseconds:7.1f} ms")


if __name__ == "__main__":
    main()
