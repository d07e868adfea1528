"""What the person at the terminal sees: lines that stay, and one that says what is being done at present."""

import collections
import os
import selectors
import shutil
import subprocess
import sys
import time

QUIET = 15  # seconds without a word, where no terminal shows a moving line
WIDTH = 120


class Stop(Exception):
    """The reason why the run ends here, what the person can do, and the exit code."""

    def __init__(self, reason, do, code=2):
        super().__init__(reason)
        self.reason, self.do, self.code = reason, do, code


class Screen:
    def __init__(self, stream=None):
        self.stream = stream or sys.stdout
        self.moving = self.stream.isatty()
        self.doing, self.since, self.spoke = "", 0.0, time.monotonic()
        self.more = None

    def step(self, number, title):
        self.say()
        self.say(f"[{number}/6] {title}")

    def say(self, text=""):
        self._clear()
        print(text, file=self.stream, flush=True)
        self.spoke = time.monotonic()

    def now(self, doing, more=None):
        """Set what is being done; it is shown with the seconds that it takes, and with what ``more()`` says then."""
        self.doing, self.since, self.more = doing, time.monotonic(), more
        self.beat()

    def detail(self, doing):
        """Change the words of what is being done, and let its clock run on."""
        self.doing = doing
        self.beat()

    def done(self):
        self._clear()
        self.doing = ""

    def beat(self):
        """Show that the work goes on. To be called several times a second."""
        if not self.doing:
            return
        if self.moving:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write("\r\x1b[K" + self._present()[:width])
            self.stream.flush()
        elif time.monotonic() - self.spoke >= QUIET:
            self.say(self._present()[:WIDTH])

    def _present(self):
        more = self.more and self.more()
        return f"      ... {time.monotonic() - self.since:4.0f} s  {self.doing}{f': {more}' if more else ''}"

    def _clear(self):
        if self.moving:
            self.stream.write("\r\x1b[K")


def run(screen, argv, log, doing, *, env=None, on_line=None, on_fact=None):
    """
    Run a program, keep the screen alive, and return its exit code, its output, and its errors.

    log: file that errors are appended to. on_line: given each line of output and errors, returns words for the screen
    or None. on_fact: given each line that the program writes to the file descriptor named in $PROGRESS_FD; without it
    output and errors are one.
    """
    screen.now(doing)
    facts_read = facts_write = None
    environment = {**os.environ, "LC_ALL": "C.UTF-8", **(env or {})}
    if on_fact:
        facts_read, facts_write = os.pipe()
        environment["PROGRESS_FD"] = str(facts_write)
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if on_fact else subprocess.STDOUT,
        env=environment,
        pass_fds=[facts_write] if on_fact else [],
    )
    streams = {process.stdout.fileno(): _Lines(on_line)}
    output = streams[process.stdout.fileno()]
    errors = output
    if on_fact:
        os.close(facts_write)
        errors = streams[process.stderr.fileno()] = _Lines(on_line)
        streams[facts_read] = _Lines(on_fact)
    with selectors.DefaultSelector() as selector:
        for descriptor in streams:
            selector.register(descriptor, selectors.EVENT_READ)
        try:
            # A daemon that the program started may hold its output open: what counts is that the program has ended.
            while selector.get_map():
                ready = selector.select(0.2)
                for key, _ in ready:
                    data = os.read(key.fd, 65536)
                    if not data:
                        selector.unregister(key.fd)
                        continue
                    for words in streams[key.fd].feed(data):
                        screen.detail(words)
                screen.beat()
                if not ready and process.poll() is not None:
                    break
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            if facts_read is not None:
                os.close(facts_read)
    code = process.wait()
    screen.done()
    if errors.text:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"--- {time.strftime('%F %T')} {' '.join(argv)}: exit code {code}\n{errors.text}\n")
    return code, output.text, errors.text


class _Lines:
    """Bytes made into lines, each handed on as it ends; the last 10 MB are kept."""

    def __init__(self, hand_on):
        self.hand_on, self.rest = hand_on, b""
        self.kept = collections.deque()
        self.size = 0

    def feed(self, data):
        *lines, self.rest = (self.rest + data).replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            self._keep(line + b"\n")
            words = self.hand_on(line.decode(errors="replace")) if self.hand_on and line else None
            if words:
                yield words

    def _keep(self, line):
        self.kept.append(line)
        self.size += len(line)
        while self.size > 10_000_000:
            self.size -= len(self.kept.popleft())

    @property
    def text(self):
        return (b"".join(self.kept) + self.rest).decode(errors="replace").strip()
