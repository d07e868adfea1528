"""What tests/run does once the machine has Python."""

import argparse
import sys

from . import namespaces, roots, runner
from .lab import Lab

USAGE = """\
tests/run [unit|functional|lab|vm|PYTEST ARGUMENT ...]
    Run all tests, or those.
tests/run host STACK [--plain] [--name NAME] [-- COMMAND ...]
    Start a fresh host ("trixie", "bookworm+salt+apps"; --plain: without systemd) and run COMMAND, or a shell, on it.
tests/run build [STACK ...]
    Build what is not in the cache yet.
See tests/README.md.
"""


def main(argv):
    """Do what ``argv`` says and return the exit code."""
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if argv[:1] == ["host"]:
        return host(argv[1:])
    if argv[:1] == ["build"]:
        runner.build(argv[1:] or runner.STACKS)
        return 0
    return runner.run(argv)


def host(argv):
    """Start a host and run a command on it, by default a shell."""
    parser = argparse.ArgumentParser("tests/run host")
    parser.add_argument("stack", type=roots.normal)
    parser.add_argument("--plain", action="store_true", help="no systemd, as in a container")
    parser.add_argument("--name", default="xmpp1.example.org")
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments, command = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    runner.build([arguments.stack])
    names = ["example.org", *(f"{label}.example.org" for label in ("conference", "upload", "pubsub", "proxy"))]
    with Lab() as lab:
        made = lab.host(
            arguments.name, names=names, layers=arguments.stack, init=None if arguments.plain else "systemd"
        )
        return made.popen(*(command or ["bash", "-i"]), env={"TERM": "xterm"}).wait()


if __name__ == "__main__":
    sys.exit(namespaces.reap(lambda: main(sys.argv[1:])))
