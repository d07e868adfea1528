"""The disk of a machine: the lab's "<release>+salt" with a kernel, OpenZFS, ssh, and what serves the tests."""

import pathlib
import shutil

from tests.lab.library import cache, mirror, roots

from . import folders, module, packages, qemu

HERE = pathlib.Path(__file__).resolve().parent
SIZE = "4G"
# Nothing shall start by the clock alone; no terminal is there; the tests wait for what they need.
MASKED = """
apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer
getty@tty1.service ldconfig.service logrotate.timer modprobe@drm.service sanoid.timer serial-getty@ttyS0.service
sys-kernel-debug.mount sys-kernel-tracing.mount systemd-binfmt.service systemd-pstore.service systemd-timesyncd.service
systemd-udev-settle.service systemd-update-utmp-runlevel.service systemd-update-utmp.service
""".split()
# What a kernel needs to find its disks, in the order in which it can be loaded.
DRIVERS = """
virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk virtio_console failover
net_failover virtio_net scsi_common scsi_mod virtio_scsi crc-t10dif crc64 crc64-rocksoft t10-pi sd_mod
""".split()
MINION = """\
file_client: local
file_roots: {base: [/srv/salt]}
pillar_roots: {base: [/srv/pillar]}
"""
UNIT = """\
[Unit]
Description=What the tests ask of this machine
StartLimitIntervalSec=0

[Service]
ExecStart=/opt/salt-xmpp/bin/python3 /usr/local/lib/room/start.py
Restart=always
RestartSec=0.2
KillMode=process
LimitNOFILE=65536
Environment=HOME=/root LANG=C.UTF-8

[Install]
WantedBy=multi-user.target
"""
SSHD = "PermitRootLogin prohibit-password\nUseDNS no\nPrintMotd no\nPrintLastLog no\n"
# An exchange of keys that is safe from quantum computers takes an emulated processor seconds.
SSH = "KexAlgorithms curve25519-sha256\nHostKeyAlgorithms ssh-ed25519\n"
# The first makes udev read a disk's partitions again whenever somebody has written to it, so that they vanish for a
# moment while `zpool create` opens them; the second is a shell script at every event.
RULES = ["60-block.rules", "69-vdev.rules"]
# The plain root of the image; root on ZFS is for Debian's own initramfs. The root's disk is told by its place on the
# bus: which one the kernel calls sda is nobody's promise.
INIT = """\
#!/busybox sh
B=/busybox
$B mount -t devtmpfs d /dev; $B mount -t proc p /proc; $B mount -t sysfs s /sys
while read -r module; do $B insmod /modules/$module.ko; done </modules/order
while set -- /sys/bus/scsi/devices/*:0:ROOT:0/block/* && [ ! -b "/dev/${1##*/}" ]; do $B sleep 0.05; done
$B mount -t ext4 -o rw,noatime "/dev/${1##*/}" /root
for place in dev proc sys; do $B mount --move /$place /root/$place; done
exec $B switch_root /root /sbin/init
"""
# The kernel goes last: its scripts want programs of the others.
INSTALL = """
set -eu
mkdir /kernel
mv /debs/linux-image-* /kernel
dpkg --force-unsafe-io --install /debs/*.deb
dpkg --force-unsafe-io --install /kernel/*.deb
rm -r /debs /kernel
"""
INITRDS = """
set -eu
depmod "$KERNEL"
update-initramfs -c -k "$KERNEL"
cd /small && find . | cpio --quiet --create --format=newc --owner=0:0 >/boot/small.img
"""
KEYS = """
set -eu
ssh-keygen -q -t ed25519 -N '' -C root -f /root/.ssh/id_ed25519
cp /root/.ssh/id_ed25519.pub /root/.ssh/authorized_keys
printf '* %s\\n' "$(cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub)" >/etc/ssh/ssh_known_hosts
rm -f /etc/ssh/ssh_host_rsa_key* /etc/ssh/ssh_host_ecdsa_key*
"""


def key(release):
    """Return the cache key of the image of ``release``."""
    sources = [(HERE / name).read_text() for name in ("image.py", "start.py")]
    return cache.digest(roots.key(f"{release}+salt"), packages.key(release), module.key(release), sources)


def get(release):
    """Return the folder of the image of ``release``: root.qcow2, vmlinuz, and the initramfs plain.img and zfs.img."""
    return cache.get(f"vm-image-{release}", key(release), lambda folder: build(release, folder))


def boot(folder, root=None):
    """Return what a machine of the image in ``folder`` boots: kernel, initramfs and command line.

    root
        Where its root is on ZFS ("ZFS=rpool/ROOT/debian", "zfs:AUTO"); None for the image itself.
    """
    if root:
        return folder / "vmlinuz", folder / "zfs.img", f"root={root} rw"
    return folder / "vmlinuz", folder / "plain.img", "rw"


def build(release, folder):
    """Fill ``folder``."""
    kernel, _ = module.versions(release)
    with folders.upon(roots.get(f"{release}+salt"), folder / ".layers") as root:
        with folders.alive(root):
            install(release, root)
            configure(root)
            small(root, kernel)
            folders.inside(root, "sh", "-c", KEYS + INITRDS, KERNEL=kernel)
        shutil.rmtree(root / "small")
        shutil.move(root / "boot/small.img", folder / "plain.img")
        shutil.copy(root / f"boot/initrd.img-{kernel}", folder / "zfs.img")
        shutil.copy(root / f"boot/vmlinuz-{kernel}", folder / "vmlinuz")
        raw = folder / "root.raw"
        mirror.run("truncate", f"--size={SIZE}", str(raw))
        options = ["-E", "lazy_itable_init=0,lazy_journal_init=1", "-J", "size=16", "-m0", "-L", "root"]
        mirror.run("mkfs.ext4", "-q", "-F", *options, "-d", str(root), str(raw))
    mirror.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(folder / "root.qcow2"))
    raw.unlink()


def install(release, root):
    """Install the packages; no service is started."""
    (root / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
    (root / "usr/sbin/policy-rc.d").chmod(0o755)
    shutil.copytree(packages.get(release) / "image", root / "debs")
    shutil.copy(module.get(release), root / "debs")
    # The initramfs is made once, at the end.
    folders.inside(root, "sh", "-c", INSTALL, INITRD="No")
    (root / "usr/sbin/policy-rc.d").unlink()


def configure(root):
    """Write what makes it a machine of the tests."""
    files = {
        "etc/fstab": "",
        "etc/hostname": "machine\n",
        "etc/hosts": "127.0.0.1 localhost machine\n",
        "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
        "etc/modprobe.d/zfs.conf": "options zfs zfs_arc_max=134217728\n",
        "etc/salt/minion.d/room.conf": MINION,
        "etc/ssh/ssh_config.d/room.conf": SSH,
        "etc/ssh/sshd_config.d/room.conf": SSHD,
        "etc/systemd/system/room.service": UNIT,
        "usr/local/lib/room/start.py": (HERE / "start.py").read_text(),
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    for place in ("srv/salt", "srv/pillar"):
        (root / place).mkdir(parents=True, exist_ok=True)
    (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
    units = root / "etc/systemd/system"
    for unit in MASKED:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    for name in RULES:
        (root / "etc/udev/rules.d" / name).symlink_to("/dev/null")
    folders.inside(root, "systemctl", "enable", "room.service", "ssh.service")
    settings = root / "etc/initramfs-tools/initramfs.conf"
    lines = [line for line in settings.read_text().splitlines() if not line.startswith(("MODULES=", "COMPRESS="))]
    settings.write_text("\n".join([*lines, "MODULES=list", "COMPRESS=lz4", ""]))
    with open(root / "etc/initramfs-tools/modules", "a") as file:
        file.write("\n".join(["", *DRIVERS, ""]))


def small(root, kernel):
    """Lay out an initramfs that has only what a machine with a plain root needs: it boots twice as fast."""
    place = root / "small"
    for name in ("dev", "proc", "sys", "root", "modules"):
        (place / name).mkdir(parents=True)
    shutil.copy(root / "bin/busybox", place / "busybox")
    (place / "init").write_text(INIT.replace("ROOT", str(qemu.ROOT)))
    (place / "init").chmod(0o755)
    found = {file.name.split(".")[0]: file for file in root.glob(f"usr/lib/modules/{kernel}/kernel/**/*.ko*")}
    order = [name for name in DRIVERS if name in found]
    for name in order:
        target = place / "modules" / found[name].name
        shutil.copy(found[name], target)
        if target.suffix == ".xz":
            mirror.run("xz", "--decompress", str(target))
    (place / "modules/order").write_text("".join(f"{name}\n" for name in order))
