"""A room of machines on one wire."""

import contextlib
import os
import pathlib
import shutil
import tempfile

from tests.lab.library import cache
from tests.lab.library.lab import run_folder

from . import image, template
from .machine import Machine
from .switch import Switch

rooms = []


class Room:
    """Machines of one ``release`` ("bookworm", "trixie"), on one wire with each other and nothing else."""

    def __init__(self, release):
        self.release = release
        self.image = image.get(release)
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="vm-", dir=run_folder()))
        self.machines = {}
        self.switch = Switch()
        rooms.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def template(self, on_zfs=False):
        """Return the folder of the saved machine from which machines are started."""
        return template.get(self.release, on_zfs)

    def machine(self, name="machine", disks=1, size="4G", start=True, on_zfs=False):
        """Return a new machine, switched on unless told otherwise.

        name
            Its name; other machines that are started later find it under that.
        disks
            How many empty disks it has, or disks that ``freeze`` returned.
        size
            How large the empty ones are; they take no space until written.
        on_zfs
            Whether its root is on ZFS: the pool rpool on a disk of its own, rpool/ROOT/debian mounted at /.
        """
        if name in self.machines:
            raise ValueError(f"there is a machine {name} already")
        machine = Machine(self, name, len(self.machines), on_zfs)
        self.machines[name] = machine
        for disk in [None] * disks if isinstance(disks, int) else disks:
            machine.add_disk(size, disk)
        if start:
            machine.start()
        return machine

    def pair(self, *names, **options):
        """Return several machines that find each other by name; root of each may be root on all by ssh."""
        made = [self.machine(name, start=False, **options) for name in names or ("source", "target")]
        for machine in made:
            machine.start()
        return made

    def freeze(self, machine):
        """Export its pools, switch the machine off, and return its disks: many machines can be made of them."""
        machine.run("zpool", "export", "-a")
        machine.destroy()
        kept = pathlib.Path(tempfile.mkdtemp(prefix="disks-", dir=run_folder()))
        return [str(shutil.move(disk, kept / disk.name)) for disk in machine.disks]

    def save_logs(self, name):
        """Keep what the machines said under ``name`` and return the folder."""
        folder = logs_folder() / name
        shutil.rmtree(folder, ignore_errors=True)
        for machine in self.machines.values():
            place = folder / machine.name
            place.mkdir(parents=True)
            for log in ("console.log", "qemu.log"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(machine.folder / log, place)
            if machine.on:
                with contextlib.suppress(Exception):
                    (place / "journal").write_text(machine.run("journalctl", "--no-pager", "-b", timeout=60).stdout)
                    pools = machine.sh("zpool status; zpool history -i; zfs list -t all", check=False, timeout=60)
                    (place / "zfs").write_text(pools.stdout)
        return folder

    def close(self):
        """End all machines."""
        rooms.remove(self)
        for machine in list(self.machines.values()):
            machine.destroy()
        self.switch.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def logs_folder():
    """Return where the logs of this run go."""
    return pathlib.Path(os.environ.get("LAB_LOGS") or cache.ROOT / "logs" / run_folder().name)
