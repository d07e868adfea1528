"""A machine that has booted, with Salt loaded, saved so that many go on from there."""

import pathlib

from tests.lab.library import cache

from . import image, qemu
from .machine import AUTO, BOOT, Line

HERE = pathlib.Path(__file__).resolve().parent
# ZFS draws its GUIDs from a generator that is seeded when the module is loaded: were it loaded in the template, all
# machines would draw the same ones. With the root on ZFS it must be: there are no two such machines in a test.
UNLOADED = "systemd.mask=zfs-load-module.service"
POOL = """
zpool create -o ashift=12 -O compression=lz4 -O acltype=posixacl -O xattr=sa -O atime=off \\
    -O mountpoint=none -O canmount=off -R /mnt rpool "$1"
zfs create -o mountpoint=none rpool/ROOT
zfs create -o canmount=noauto -o mountpoint=/ rpool/ROOT/debian
zfs mount rpool/ROOT/debian
zfs create -o mountpoint=/home rpool/home
zpool set bootfs=rpool/ROOT/debian rpool
mkdir /image
mount --bind / /image
rm -f /image/etc/zfs/zpool.cache
cp --archive --one-file-system /image/. /mnt/
rmdir /mnt/image
zpool export rpool
"""


def key(release, on_zfs):
    """Return the cache key of the template of ``release``."""
    sources = [(HERE / name).read_text() for name in ("agent.py", "qemu.py", "template.py")]
    return cache.digest(image.key(release), qemu.version(), sources, on_zfs)


def get(release, on_zfs=False):
    """Return the folder of the template of ``release``: memory, state, root.qcow2."""
    kind = f"vm-template-{release}" + "-zfs" * on_zfs
    return cache.get(kind, key(release, on_zfs), lambda folder: build(release, on_zfs, folder))


def root_on_zfs(release):
    """Return the disk with a pool that has a copy of the image of ``release``."""

    def build(folder):
        from .room import Room  # which starts machines from the template without ZFS

        with Room(release) as room:
            machine = room.machine(size="8G")
            machine.sh(POOL, *machine.devices, timeout=BOOT)
            machine.destroy()
            machine.disks[0].rename(folder / "root.qcow2")

    key = cache.digest(image.key(release), POOL)
    return cache.get(f"vm-rpool-{release}", key, build) / "root.qcow2"


def build(release, on_zfs, folder):
    """Boot, load, save."""
    source = image.get(release)
    root = root_on_zfs(release) if on_zfs else source / "root.qcow2"
    qemu.make_disk(folder / "root.qcow2", backing=root)
    kernel, initrd, command_line = image.boot(source, AUTO if on_zfs else None)
    boot = (kernel, initrd, command_line if on_zfs else f"{command_line} {UNLOADED}")
    machine = qemu.Qemu(folder, folder / "root.qcow2", boot, folder / "memory", keep=True)
    try:
        line = Line("template", machine.control)
        machine.resume()
        line.wait_ready(BOOT)
        settle(line)
        machine.pause()
        machine.save(folder / "state")
        machine.ask("quit")
        machine.process.wait(60)
    except BaseException as error:
        error.add_note((folder / "console.log").read_text(errors="replace")[-4000:])
        raise
    finally:
        machine.kill()


def settle(line):
    """Let it end its boot, load Salt, and write what it has to write."""

    def run(*argv):
        return line.ask("run", BOOT, {"argv": argv, "input": "", "env": {}, "user": None, "timeout": BOOT})[1]

    state = run("systemctl", "is-system-running", "--wait")
    if state != "running\n":
        raise RuntimeError(f"the template did not boot as it should: {state}{run('systemctl', '--failed')}")
    line.ask("load", BOOT, {"everything": True})
    run("sync")
