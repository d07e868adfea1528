"""
Streams from one side to the other
==================================

Each dataset's stream is a chain of processes joined by pipes, ``zfs send`` at its head and ``zfs receive`` at its end.
In the middle this process moves the bytes from pipe to pipe by splice(2), so that it can count and hold them back
without ever copying them.
"""

import concurrent.futures
import contextlib
import fcntl
import os
import subprocess
import tempfile
import threading
import time

from salt.exceptions import CommandExecutionError

__virtualname__ = "zfs_dr"

PIPE = 1 << 20
COMPRESS = {
    "zstd": (["zstd", "-q", "-3", "-c"], ["zstd", "-q", "-d", "-c"]),
    "lz4": (["lz4", "-q", "-1", "-c"], ["lz4", "-q", "-d", "-c"]),
    "gzip": (["gzip", "-1", "-c"], ["gzip", "-d", "-c"]),
}


def __virtual__():
    return __virtualname__


class _Limit:
    """So many bytes a second, for all streams together."""

    def __init__(self, rate):
        self.rate = rate
        self.free = time.monotonic()
        self.lock = threading.Lock()

    def wait(self, count):
        with self.lock:
            self.free = max(self.free, time.monotonic()) + count / self.rate
            pause = self.free - time.monotonic()
        if pause > 0:
            time.sleep(pause)


def _widen(pipe):
    # A wider pipe means fewer turns; a user over its share of pipe buffers keeps what it has.
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE)


class _Chain:
    """The processes of one stream."""

    def __init__(self, job):
        self.job = job
        self.errors = []
        self.processes = []
        self.bytes = 0

    def start(self, argv, stdin):
        errors = tempfile.TemporaryFile()  # noqa: SIM115 (read and closed when the chain has ended)
        self.errors.append(errors)
        process = subprocess.Popen(
            argv, stdin=stdin, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, "LC_ALL": "C.UTF-8"}
        )
        if stdin is not subprocess.DEVNULL:
            stdin.close()
        _widen(process.stdout)
        self.processes.append((argv, process))
        return process.stdout

    def run(self, limit, stop):
        out = subprocess.DEVNULL
        for argv in self.job["send"]:
            out = self.start(argv, out)
        reader, writer = os.pipe()
        _widen(writer)
        stdin = os.fdopen(reader, "rb")
        for argv in self.job["receive"]:
            stdin = self.start(argv, stdin)
        try:
            self.relay(out.fileno(), writer, limit, stop)
        finally:
            os.close(writer)
            out.close()
            with stdin:
                # What receive says is nothing; the end of it is what counts.
                while os.read(stdin.fileno(), 65536):
                    pass
            codes = [process.wait() for _, process in self.processes]
        return codes

    def relay(self, source, sink, limit, stop):
        size = min(PIPE, max(4096, limit.rate // 10)) if limit else PIPE
        while not stop.is_set():
            try:
                moved = os.splice(source, sink, size)
            except BrokenPipeError:
                return
            if not moved:
                return
            self.bytes += moved
            if limit:
                limit.wait(moved)

    def said(self):
        texts = []
        for file in self.errors:
            file.seek(0)
            texts.append(file.read().decode(errors="replace").strip())
            file.close()
        return texts


def streams(jobs, parallel=4, bandwidth=0, progress=None):
    """
    Move streams, several at once.

    jobs
        (list of dicts) Each has ``name``, ``send`` and ``receive``: lists of processes, each a list of words, as
        :func:`zfs_dr_side.words` gives them; and ``bytes``, what is expected.
    parallel
        (int) How many at once. Default: 4.
    bandwidth
        (int) Bytes a second, all together. Default: 0, no limit.
    progress
        (callable) Called about once a second, and at the end, with a dict: ``bytes``, ``expected``, ``seconds``,
        ``done`` (number of streams), ``streams``, ``running`` (names). Default: none.

    Returns a dict, name to ``bytes`` (moved), ``seconds`` and ``error`` (text, or ``None``). After a failure, streams
    that have not begun do not begin, and say so; those that run are let run to their end.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.streams '[]'
    """
    begun = time.monotonic()
    limit = _Limit(bandwidth) if bandwidth else None
    stop, failed = threading.Event(), threading.Event()
    chains = {job["name"]: _Chain(job) for job in jobs}
    results = {}

    def one(job):
        if failed.is_set():
            return {"bytes": 0, "seconds": 0.0, "error": "not begun, since another dataset's transfer failed"}
        chain, start = chains[job["name"]], time.monotonic()
        try:
            codes = chain.run(limit, stop)
        except OSError as error:
            failed.set()
            for _, process in chain.processes:
                process.terminate()
                process.wait()
            return {"bytes": chain.bytes, "seconds": time.monotonic() - start, "error": f"{job['name']}: {error}"}
        error = _error(chain, codes)
        if error:
            failed.set()
        return {"bytes": chain.bytes, "seconds": time.monotonic() - start, "error": error}

    def report():
        moved = sum(chain.bytes for chain in chains.values())
        # What is expected is an estimate, until it has come.
        expected = sum(chains[job["name"]].bytes if job["name"] in results else job.get("bytes", 0) for job in jobs)
        progress(
            {
                "bytes": moved,
                "expected": max(moved, expected),
                "seconds": time.monotonic() - begun,
                "done": len(results),
                "streams": len(jobs),
                "running": [name for name, chain in chains.items() if chain.processes and name not in results],
            }
        )

    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        waiting = {pool.submit(one, job): job["name"] for job in jobs}
        try:
            while waiting:
                done, _ = concurrent.futures.wait(waiting, 1, concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    results[waiting.pop(future)] = result = future.result()
                    if result["error"]:
                        # Here: in a thread of its own, Salt's __salt__ is nothing.
                        result["error"] += __salt__["zfs_dr.advice"](result["error"])
                if progress and (not done or not waiting):
                    report()
        except BaseException:
            stop.set()
            failed.set()
            for chain in chains.values():
                for _, process in chain.processes:
                    process.terminate()
            raise
    return results


def _error(chain, codes):
    texts = chain.said()
    if not any(codes):
        return None
    # A sender whose receiver has gone only says so: the cause is with the other.
    causes = [text for code, text in zip(codes, texts, strict=True) if code and text and "Broken pipe" not in text]
    said = "; ".join(causes) or f"exit codes {', '.join(map(str, codes))}"
    return f"{chain.job['name']}: {said}"


def compressed(side, argv, how, sends, stack=None):
    """
    Tell the processes of one end of a stream.

    side
        (dict or None) One of what :func:`zfs_dr_side.connect` returns.
    argv
        (list) The ``zfs send`` or ``zfs receive``.
    how
        (string) ``none``, ``zstd``, ``lz4``, ``gzip``: what is on the wire.
    sends
        (bool) Whether it is the sending end.
    stack
        (string) As :func:`zfs_dr_side.words` takes it. Default: none.

    Returns a list of processes, each a list of words. Raises ``CommandExecutionError`` when the program is missing
    here.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.compressed null '[zfs, send, tank/a@b]' zstd True
    """
    if how == "none" or side is not None:
        return [__salt__["zfs_dr.words"](side, argv, through=how, stack=stack)]
    program = __salt__["zfs_dr.words"](None, COMPRESS[how][0 if sends else 1])
    main = __salt__["zfs_dr.words"](None, argv)
    return [main, program] if sends else [program, main]


def check_streams(results):
    """
    Raise what went wrong in streams.

    results
        (dict) What :func:`streams` returned.

    Raises ``CommandExecutionError`` with every error.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.check_streams '{}'
    """
    errors = [result["error"] for result in results.values() if result["error"]]
    begun = [error for error in errors if not error.startswith("not begun")]
    if errors:
        rest = len(errors) - len(begun)
        raise CommandExecutionError("\n".join([*begun, *([f"{rest} further transfers had not begun"] if rest else [])]))
