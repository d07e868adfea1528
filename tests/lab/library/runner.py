"""Builds what the tests need and runs them."""

import concurrent.futures
import os
import subprocess
import sys
import time

from tests.vm.library.build import build as build_machines

from . import cache, index, lab, mirror, roots
from .packages import CHECKOUT, RELEASES, REQUIREMENTS

SUITES = ("unit", "functional", "lab", "vm")
STACKS = [f"{release}{layers}" for release in RELEASES for layers in ("", "+salt+apps+functional")]
WITH_HOSTS = {"functional", "lab"}


def run(argv):
    """Run ruff and pytest with ``argv`` (names of suites, arguments of pytest) and return the exit code."""
    started = time.monotonic()
    chosen = [f"tests/{name}" for name in argv if name in SUITES]
    rest = [word for word in argv if word not in SUITES]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        tools = pool.submit(venv)
        machines = pool.submit(build_machines) if "vm" in suites(argv) else None
        if suites(argv) & WITH_HOSTS:
            build(STACKS)
        if machines:
            machines.result()
        bin_ = tools.result() / "bin"
    lab.run_folder()  # one for all processes of pytest
    print(f"== everything is built ({time.monotonic() - started:.0f} s)", flush=True)
    # The lint goes first and its verdict last: one run shall tell everything.
    lint = subprocess.run([bin_ / "ruff", "check", "--no-cache", "."], cwd=CHECKOUT).returncode
    # One more than there are cores: a quarter of the time, a test waits for something.
    pytest = [
        bin_ / "python3",
        "-m",
        "pytest",
        "--config-file=tests/pytest.ini",
        f"--numprocesses={os.cpu_count() + 1}",
        *chosen,
        *rest,
    ]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PATH": f"{bin_}:{os.environ['PATH']}"}
    code = subprocess.run(pytest, cwd=CHECKOUT, env=environment).returncode
    if lint:
        print("tests/run: ruff found something, see the beginning", file=sys.stderr)
    return code or lint


def suites(argv):
    """Return the suites that ``argv`` names, also by a path; it names none: all."""
    named = {name for name in SUITES for word in argv if f"{word}/".startswith((f"{name}/", f"tests/{name}/"))}
    return named or set(SUITES)


def venv():
    """Return the virtual environment in which the tests run."""

    def make(folder):
        place = folder / "venv"
        subprocess.run(["/usr/bin/python3", "-m", "venv", place], check=True)
        pip = [
            place / "bin/pip",
            "install",
            "--quiet",
            "--retries=10",
            "--disable-pip-version-check",
            "--prefer-binary",
            "--requirement",
            REQUIREMENTS,
        ]
        subprocess.run(pip, check=True)
        # The cache gives it another name when it is whole, and its scripts say where their Python is.
        for script in (place / "bin").iterdir():
            if script.is_file() and script.read_bytes().startswith(b"#!"):
                script.write_text(script.read_text().replace(str(folder), str(folder.parent / key)))

    key = cache.digest(REQUIREMENTS.read_text(), sys.version)
    return cache.get("venv", key, make) / "venv"


def build(stacks):
    """Build what ``stacks`` and the lab need and the cache lacks, the releases side by side."""

    def one(release):
        mirror.get(release)
        with concurrent.futures.ThreadPoolExecutor() as side:
            packages = side.submit(index.get, release)
            roots.get(release)
            packages.result()
        for stack in stacks:
            if stack.split("+")[0] == release:
                roots.get(stack)

    mirror.signing_key()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(one, RELEASES))
