"""One process of QEMU, always by emulation (TCG): the machine's processor never counts."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import time

PROGRAM = "qemu-system-x86_64"
MEMORY = 1536
# The number on the SCSI bus of the disk with the system.
ROOT = 200
# One, and room for a second that never comes: for one alone QEMU before 8.1 leaves out the processor's memory barriers,
# and then now and then a disk is not told of a request, or the machine not of its end, and waits for ever.
PROCESSORS = "1,maxcpus=2"
# What guards or speeds up a real processor makes an emulated one slow: where no process has addresses of its own, QEMU
# finds again what it has translated (zfs takes a third of the time); a "rep movs" becomes a step for each byte.
KERNEL = "mitigations=off norandmaps clearcpuid=rep_good,erms,fsrm"
# "no-flush": a flush of the guest makes QEMU write its own tables, not this machine its disk. So what the guest flushed
# outlives QEMU's death; of the rest only what lay upon blocks that the image had already.
CACHE = {"direct": False, "no-flush": True}


@functools.cache
def version():
    """Return what QEMU says of its version; a saved machine is restored by the very same only."""
    return subprocess.run([PROGRAM, "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]


def make_disk(path, size=None, backing=None):
    """Make a disk of ``size`` ("4G"), or one with the content of the disk ``backing``."""
    size = [size] if size else []
    base = ["-F", "qcow2", "-b", str(backing)] if backing else []
    # Small clusters: so that hardly a new block shares one with an old one.
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", *base, str(path), *size]
    subprocess.run(command, check=True)


def node(name, path):
    """Return what QEMU calls a block node: the disk in the file ``path``."""
    file = {"driver": "file", "filename": str(path), "cache": CACHE, "discard": "unmap"}
    # All tables of the image in memory, so that none is written before its time.
    tables = {"l2-cache-size": 32 << 20, "cache-clean-interval": 0}
    return {"driver": "qcow2", "node-name": name, "file": file, "cache": CACHE, "discard": "unmap", **tables}


def device(name, number):
    """Return the device that shows the machine the node ``name``."""
    place = {"bus": "scsi.0", "scsi-id": number, "lun": 0}
    return {"driver": "scsi-hd", "id": name, "drive": name, "serial": name, "write-cache": "on", **place}


class Qemu:
    """A running machine, paused until ``resume``.

    folder
        Where its console.log and qemu.log go.
    root
        The disk that its system is on: /dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_root.
    boot
        Kernel, initramfs and command line.
    memory
        File that holds its memory.
    keep
        Whether what it changes in its memory is written to that file.
    incoming
        File with the state of a saved machine to go on from; None to boot.
    wire
        Its end of a network cable (a socket); None for a cable that leads nowhere.
    processors
        How many, as QEMU's -smp takes it.
    """

    def __init__(self, folder, root, boot, memory, keep=False, incoming=None, wire=None, processors=PROCESSORS):
        self.folder = folder
        kernel, initrd, command_line = boot
        nowhere, loose = socket.socketpair()
        wire = wire or loose
        self.control, control = socket.socketpair()
        self._monitor, monitor = socket.socketpair()
        self._replies = self._monitor.makefile("r")
        handed = [control.fileno(), monitor.fileno(), wire.fileno()]
        command = [
            PROGRAM, "-nodefaults", "-no-user-config", "-display", "none", "-S", "-machine", "q35,memory-backend=ram",
            "-accel", "tcg", "-cpu", "max,cx16=off", "-smp", processors, "-m", f"{MEMORY}M",
            "-object", f"memory-backend-file,id=ram,size={MEMORY}M,mem-path={memory},share={'on' if keep else 'off'}",
            "-kernel", str(kernel), "-initrd", str(initrd), "-append", f"console=ttyS0 quiet {KERNEL} {command_line}",
            "-chardev", f"file,id=console,path={folder}/console.log,append=on", "-serial", "chardev:console",
            "-chardev", f"socket,id=monitor,fd={handed[1]}", "-mon", "chardev=monitor,mode=control",
            "-chardev", f"socket,id=room,fd={handed[0]}", "-device", "virtio-serial-pci",
            "-device", "virtserialport,chardev=room,name=room",
            "-device", "virtio-scsi-pci,id=scsi",
            "-netdev", f"stream,id=wire,addr.type=fd,addr.str={handed[2]}",
            "-device", "virtio-net-pci,netdev=wire,romfile=,host_mtu=9000",
            *(["-incoming", "defer"] if incoming else []),
        ]  # fmt: skip
        command += ["-blockdev", json.dumps(node("root", root)), "-device", json.dumps(device("root", ROOT))]
        with open(folder / "qemu.log", "ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=handed)
        for end in (control, monitor, wire):
            end.close()
        nowhere.close()
        self._read()
        self.ask("qmp_capabilities")
        if incoming:
            self._migrate("migrate-incoming", f"exec:cat {incoming}")

    def ask(self, command, **arguments):
        """Ask QEMU's monitor (QMP) and return what it returned."""
        self._monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            reply = self._read()
            if "error" in reply:
                raise RuntimeError(f"QEMU: {command}: {reply['error']['desc']}")
            if "return" in reply:
                return reply["return"]

    def _read(self):
        line = self._replies.readline()
        if not line:
            code = self.process.wait(10)
            raise RuntimeError(f"QEMU ended with {code}:\n{(self.folder / 'qemu.log').read_text()[-2000:]}")
        return json.loads(line)

    def add_disk(self, number, path):
        """Plug a disk in; to the machine its serial number is ``disk<number>``."""
        self.ask("blockdev-add", **node(f"disk{number}", path))
        self.ask("device_add", **device(f"disk{number}", number))

    def remove_disk(self, number):
        """Pull a disk out; what is on it stays."""
        name = f"disk{number}"
        self.ask("device_del", id=name)
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(RuntimeError):
                self.ask("blockdev-del", **{"node-name": name})
                return
            if time.monotonic() > end:
                raise TimeoutError(f"{name} could not be pulled out")
            time.sleep(0.05)

    def writes(self):
        """Return the number of writes and flushes that its disks were asked for."""
        stats = [disk["stats"] for disk in self.ask("query-blockstats")]
        return sum(each["wr_operations"] + each["flush_operations"] for each in stats)

    def resume(self):
        """Let it run."""
        self.ask("cont")

    def pause(self):
        """Let it stand still."""
        self.ask("stop")

    def save(self, path):
        """Save the paused machine's state, but for its memory, which is in its file."""
        self._migrate("migrate", f"exec:cat >{path}")

    def _migrate(self, command, uri):
        self.ask("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
        self.ask(command, uri=uri)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            status = self.ask("query-migrate").get("status")
            if status == "completed":
                return
            if status == "failed":
                raise RuntimeError(f"QEMU: {command} failed:\n{(self.folder / 'qemu.log').read_text()[-2000:]}")
            time.sleep(0.005)
        raise TimeoutError(f"QEMU: {command} took too long")

    def kill(self):
        """End it at once, as a power cut does."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._monitor.close()
        self._replies.close()
