"""One virtual machine, as a test sees it."""

import base64
import builtins
import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time

from tests.lab.library.packages import CHECKOUT

from . import image
from .qemu import Qemu, make_disk

HERE = pathlib.Path(__file__).resolve().parent
PROGRAM = (HERE / "agent.py").read_text()
BOOT = 600
AUTO = "zfs:AUTO"


class CommandError(Exception):
    """A command on a machine ended with another code than 0."""


class PowerCut(Exception):
    """The machine was switched off, or booted anew, before it answered."""


class Machine:
    """Made by ``Room.machine``; see there for the parameters.

    name, address
        As given.
    disks
        The files of its disks here.
    devices
        The same disks as the machine names them: /dev/disk/by-id/....
    """

    def __init__(self, room, name, number, on_zfs=False):
        self.room, self.name, self.on_zfs = room, name, on_zfs
        self.address = f"192.0.2.{100 + number}"
        self.hardware = f"52:54:00:00:02:{number:02x}"
        self.hostid = 0x5A000000 + int.from_bytes(os.urandom(3), "big")
        self.machine_id = os.urandom(16).hex()
        self.folder = room.folder / name
        self.folder.mkdir()
        self.disks = []
        self.root = self.folder / "root.qcow2"
        self._qemu = None
        self._line = None

    def __repr__(self):
        return f"<machine {self.name} {self.room.release} {self.address}>"

    @property
    def devices(self):
        return [device(number) for number in range(len(self.disks))]

    # Power

    def start(self):
        """Switch it on with a fresh system and the disks that it has: within seconds, because it was booted before.

        Pools on its disks are not imported, but for the one that its root is on, if it is: that is as it was at first.
        """
        template = self.room.template(self.on_zfs)
        self.root.unlink(missing_ok=True)
        make_disk(self.root, backing=template / "root.qcow2")
        boot = image.boot(self.room.image, AUTO if self.on_zfs else None)
        self._switch_on(boot, template / "memory", incoming=template / "state")
        self._become(self.disks)
        if self.on_zfs:
            # Its root is a copy of a machine that had a checkout, and Salt was saved with the modules of that one.
            self._line.expect_reboot()
            with contextlib.suppress(PowerCut):
                self.run("systemctl", "restart", "--no-block", "room.service")
            self.wait_up()

    def boot(self, root=AUTO, timeout=BOOT, **hardware):
        """Switch it on as real machines are: with the system as it was when it was switched off.

        root
            What its kernel is told of a root on ZFS: "ZFS=rpool/ROOT/debian", or "zfs:AUTO" for what bootfs says.
        hardware
            ``processors``, as ``Qemu`` takes them.
        """
        memory = self.folder / "memory"
        memory.unlink(missing_ok=True)
        self._switch_on(image.boot(self.room.image, root if self.on_zfs else None), memory, self.disks, **hardware)
        self.wait_up(timeout)

    def _switch_on(self, boot, memory, disks=(), **options):
        self._qemu = Qemu(self.folder, self.root, boot, memory, wire=self.room.switch.plug(self.name), **options)
        for number, path in enumerate(disks):
            self._qemu.add_disk(number, path)
        self._line = Line(self.name, self._qemu.control)
        self._qemu.resume()

    def wait_up(self, timeout=BOOT):
        """Wait until it has booted (at first, or again by itself); then it is given its name and the checkout."""
        self._line.wait_ready(timeout)
        self._become()
        end = time.monotonic() + timeout
        while self.run("systemctl", "is-system-running", check=False).stdout.strip() not in ("running", "degraded"):
            if time.monotonic() > end:
                raise TimeoutError(f"{self.name} was not up after {timeout} s:\n{self.console()[-2000:]}")
            time.sleep(0.2)

    def reboot(self, timeout=BOOT):
        """Let it reboot itself in good order, and wait until it is up again."""
        self._line.expect_reboot()
        with contextlib.suppress(PowerCut):
            self.run("systemctl", "reboot", "--no-block")
        self.wait_up(timeout)

    def kill(self):
        """Cut its power. What it flushed to its disks is there; of the rest a part, or nothing, as with a real disk."""
        self._qemu.kill()
        self._line.close()
        self._qemu = self._line = None

    def writes(self):
        """Return how often it has written to its disks, or flushed them, since it was switched on."""
        return self._qemu.writes()

    def kill_at(self, writes, method, *arguments, **options):
        """Start ``method``, cut the power when the disks were written to ``writes`` times more, or else at its end.

        Return whether it got to its end. So moments can be drawn that do not depend on speed: let the method run once,
        take the difference of ``writes()``, and draw from that.
        """
        end = self.writes() + writes
        future = self.begin(method, *arguments, **options)
        # Asked without a pause, QEMU has no time for the machine.
        while not future.done() and self.writes() < end:
            time.sleep(0.003)
        self.kill()
        try:
            future.result(BOOT)
        except PowerCut:
            return False
        return True

    def copies_at(self, count, draw, method, *arguments, **options):
        """Let ``method`` run to its end, and copy the disks meanwhile at ``count`` random moments.

        Each copy is what a power cut at that moment leaves: one run shows what else takes as many machines. Moments are
        counted in writes, as for ``kill_at``; how many there will be need not be known.

        draw
            A ``random.Random``.

        Return what the method returned, and the copies in the order in which they were made: pairs of a number of
        writes and a list of disk files, which ``add_disk`` takes.
        """
        folder = pathlib.Path(tempfile.mkdtemp(prefix="copies-", dir=self.folder))
        copies, begin, seen = [], self.writes(), 0
        future = self.begin(method, *arguments, **options)
        while not future.done():
            time.sleep(0.003)
            now = self.writes() - begin
            # A reservoir: each write is kept as likely as any other.
            chosen = {number if number < count else draw.randrange(number + 1) for number in range(seen, now)}
            chosen = [place for place in chosen if place < count]
            seen = now
            if chosen:
                copy = now, self._copy(folder / str(now))
                for place in chosen:
                    copies[place : place + 1] = [copy]
        kept = dict(copies)
        for place in folder.iterdir():
            if int(place.name) not in kept:
                shutil.rmtree(place)
        return future.result(0), sorted(kept.items())

    def _copy(self, folder):
        """Copy the disks of the machine as they are this moment: with what it flushed, as when it is killed."""
        folder.mkdir()
        process = self._qemu.process.pid
        paths = [folder / disk.name for disk in self.disks]
        # Not QEMU's own pause: that writes everything down first.
        os.kill(process, signal.SIGSTOP)
        try:
            while any(state_of(task) != "T" for task in pathlib.Path(f"/proc/{process}/task").iterdir()):
                time.sleep(0.001)
            for disk, path in zip(self.disks, paths, strict=True):
                subprocess.run(["cp", "--reflink=auto", "--sparse=always", disk, path], check=True)
        finally:
            os.kill(process, signal.SIGCONT)
        return paths

    def pause(self):
        """Let it stand still, as a machine that hangs."""
        self._qemu.pause()

    def resume(self):
        """Let it go on."""
        self._qemu.resume()

    @property
    def on(self):
        """Whether it is switched on."""
        return self._qemu is not None

    def destroy(self):
        """Switch it off for good."""
        if self._qemu:
            self.kill()
        self.room.machines.pop(self.name, None)

    def console(self):
        """Return what its kernel and its boot said."""
        return (self.folder / "console.log").read_text(errors="replace")

    # Disks

    def add_disk(self, size="4G", backing=None):
        """Give it one more disk, empty or with the content of the disk file ``backing``; return the device."""
        path = self.folder / f"disk{len(self.disks)}.qcow2"
        make_disk(path, None if backing else size, backing)
        self.disks.append(path)
        if self._qemu:
            self._plug(len(self.disks) - 1, path)
        return self.devices[-1]

    def pull_disk(self, number):
        """Pull a disk out while it runs; it is there again after the next start."""
        self._qemu.remove_disk(number)

    def _plug(self, number, path):
        self._qemu.add_disk(number, path)
        self._ask("appear", BOOT, devices=[device(number)])

    # Work

    def run(self, *argv, input="", env=None, user=None, timeout=300, check=True):
        """Run ``argv`` and return the ``subprocess.CompletedProcess`` with its output as text.

        input
            Text or bytes for its standard input.
        env
            Further variables.
        user
            Name of the user who shall run it (default: root).
        timeout
            Seconds after which it is killed and ``TimeoutError`` raised.
        check
            Whether a code other than 0 raises ``CommandError``.
        """
        code, output, errors = self._ask(
            "run", timeout + 60, argv=argv, input=encoded(input), env=env or {}, user=user, timeout=timeout
        )
        if check and code:
            what = " ".join(argv)[:2000]
            raise CommandError(f"{self.name}: {what}\nended with {code}\n{output[-8000:]}\n{errors[-8000:]}")
        return subprocess.CompletedProcess(argv, code, output, errors)

    def sh(self, script, *arguments, **options):
        """Run ``script`` by bash, which stops at the first error, with $1, $2, ...; ``options`` as for ``run``."""
        return self.run("bash", "-euo", "pipefail", "-c", script, "bash", *arguments, **options)

    def read(self, path):
        """Return the text of one of its files."""
        return self.get(path).decode()

    def get(self, path):
        """Return the bytes of one of its files."""
        return base64.b64decode(self._ask("get", path=str(path)))

    def put(self, path, content, mode=0o644, owner="root:root"):
        """Write one of its files, text or bytes, with the folders that it needs."""
        self._ask("put", path=str(path), content=encoded(content), mode=mode, owner=owner)

    def call(self, function, *arguments, test=False, pillar=None, config=None, timeout=600, **options):
        """Call a function of Salt's, or of ours, in the machine and return what it returned.

        An error that it raised is raised here; one of Salt's as what it is (``CommandExecutionError``). What it
        returned must be plain data, or else ``TypeError`` is raised; tuples come as lists.

        function
            "ksnap.snapshot", "zfs.list", ...
        test
            Whether Salt shall be in test mode.
        pillar, config
            The pillar, and further minion configuration (``{"ksnap:stacks": ...}`` is not expanded: give trees).
        timeout
            Seconds after which ``TimeoutError`` is raised; the call goes on in the machine.
        """
        return self._ask(
            "call", timeout, function=function, arguments=arguments, options=options, test=test, pillar=pillar or {},
            config=config or {},
        )  # fmt: skip

    def state(self, function, name, test=False, pillar=None, config=None, timeout=600, **options):
        """Apply one state ("ksnap.present") and return its result: a dict with name, result, changes, comment, ...."""
        data = {name: {function: [{key: value} for key, value in options.items()]}}
        (result,) = self.apply(data, test=test, pillar=pillar, config=config, timeout=timeout).values()
        return result

    def apply(self, data, test=False, pillar=None, config=None, timeout=600):
        """Apply states, given as an SLS file gives them, ``{id: {"ksnap.present": [{"name": ...}, ...]}}``.

        Requisites work. Return Salt's results by its tags, ``ksnap_|-ID_|-NAME_|-present``, in the order in which they
        ran.
        """
        data = {name: {**body, "__sls__": "test", "__env__": "base"} for name, body in data.items()}
        data = {name: high(body) for name, body in data.items()}
        found = self._ask("apply", timeout, data=data, test=test, pillar=pillar or {}, config=config or {})
        return dict(sorted(found.items(), key=lambda item: item[1].get("__run_num__", 0)))

    def begin(self, method, *arguments, **options):
        """Start ``method`` (one of the above) with its arguments beside all else, and return its ``Future``.

        When the power is cut first, its result is ``PowerCut``.
        """
        future = concurrent.futures.Future()

        def work():
            try:
                future.set_result(method(*arguments, **options))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future

    def _ask(self, what, wait=300, /, **arguments):
        line = self._line
        if not line:
            raise PowerCut(f"{self.name} is off")
        return line.ask(what, wait, arguments)

    # How it comes to life

    def _become(self, disks=()):
        hosts = "127.0.0.1 localhost\n" + "".join(
            f"{machine.address} {machine.name}\n" for machine in self.room.machines.values()
        )
        self._ask(
            "identity", BOOT, name=self.name, seconds=time.time(), seed=os.urandom(32).hex(), hostid=self.hostid,
            addresses=[f"{self.address}/24"], hardware=self.hardware, hosts=hosts, machine_id=self.machine_id,
        )  # fmt: skip
        # Only now: to see a disk of a pool loads OpenZFS, which shall not be before the machine has its own seed.
        for number, path in enumerate(disks):
            self._qemu.add_disk(number, path)
        self._ask("checkout", BOOT, files=modules_here())
        self._ask("appear", BOOT, devices=self.devices)


class Line:
    """The wire between the tests and what serves them in the machine."""

    def __init__(self, name, connection):
        self.name, self._socket = name, connection
        self._lock = threading.Lock()
        self._waiting = {}
        self._number = 0
        self._ready = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self, what, timeout, arguments):
        """Ask, wait for the answer, and return it; raise what was raised there."""
        future = concurrent.futures.Future()
        with self._lock:
            self._number += 1
            number = self._number
            self._waiting[number] = future
        message = json.dumps({"id": number, "do": what, **arguments}).encode() + b"\n"
        try:
            with self._lock:
                self._socket.sendall(message)
        except OSError:
            self._fail()
        try:
            reply = future.result(timeout)
        except concurrent.futures.TimeoutError:
            raise TimeoutError(f"{self.name}: no answer to {what} within {timeout} s") from None
        finally:
            self._waiting.pop(number, None)
        if "raised" in reply:
            raise error_of(*reply["raised"])
        return reply["result"]

    def wait_ready(self, timeout):
        """Wait until the machine has booted so far that it listens."""
        if not self._ready.wait(timeout):
            raise TimeoutError(f"{self.name} did not boot within {timeout} s")

    def expect_reboot(self):
        """Let ``wait_ready`` wait for the next boot."""
        self._ready.clear()

    def close(self):
        """Hang up; who waits is told."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._fail()

    def _listen(self):
        with self._socket.makefile("rb") as stream:
            while True:
                try:
                    line = stream.readline()
                except OSError:
                    line = b""
                if not line.endswith(b"\n"):
                    break
                message = json.loads(line)
                if "hello" in message:
                    self._fail()
                    with self._lock:
                        self._socket.sendall(json.dumps({"program": PROGRAM}).encode() + b"\n")
                elif "ready" in message:
                    self._ready.set()
                elif future := self._waiting.get(message["id"]):
                    future.set_result(message)
        self._fail()
        self._socket.close()

    def _fail(self):
        for future in list(self._waiting.values()):
            if not future.done():
                future.set_exception(PowerCut(f"{self.name} went off"))


def device(number):
    """Return the device of a disk in a machine."""
    return f"/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_disk{number}"


def state_of(task):
    """Return what a thread does, as proc(5) has it: R, S, D, T."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def encoded(content):
    """Return text or bytes for the wire."""
    return base64.b64encode(content.encode() if isinstance(content, str) else content).decode()


def high(body):
    """Return the body of a state as Salt's compiler makes it of ``{"module.function": [arguments]}``."""
    made = {}
    for key, value in body.items():
        name, _, function = key.partition(".")
        made[name] = [*(value or []), function] if function else value
    return made


def error_of(kind, text, trace):
    """Return the exception that was raised in a machine."""
    try:
        import salt.exceptions as known
    except ImportError:
        # tests/run builds with a Python that has no Salt; the tests have one.
        known = builtins
    found = getattr(builtins, kind, None) or getattr(known, kind, None)
    if not (isinstance(found, type) and issubclass(found, Exception)):
        found, text = RuntimeError, f"{kind}: {text}"
    try:
        error = found(text)
    except TypeError:
        error = RuntimeError(f"{kind}: {text}")
    error.add_note(f"in the machine:\n{trace}")
    return error


def modules_here():
    """Return the modules and states of this checkout: ``{"modules": {file name: text}, "states": ...}``."""
    folders = {kind: sorted((CHECKOUT / f"_{kind}").glob("*.py")) for kind in ("modules", "states")}
    return {kind: {file.name: file.read_text() for file in files} for kind, files in folders.items()}
