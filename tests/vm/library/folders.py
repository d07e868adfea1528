"""Debian file systems made of layers, in which programs can be run."""

import contextlib
import os
import shutil
import subprocess

from tests.lab.library import mirror

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}


@contextlib.contextmanager
def upon(lower, folder):
    """Give the path of the layers ``lower`` (topmost first) as one tree; what is changed in it is lost at the end."""
    root = folder / "root"
    for name in ("upper", "work", "root"):
        (folder / name).mkdir(parents=True)
    layers = f"lowerdir={':'.join(lower)},upperdir={folder}/upper,workdir={folder}/work,volatile"
    mirror.run("mount", "-t", "overlay", "overlay", "-o", layers, str(root))
    try:
        yield root
    finally:
        mirror.run("umount", "--recursive", str(root))
        shutil.rmtree(folder)


@contextlib.contextmanager
def alive(root):
    """Mount in ``root`` what programs expect to find."""
    for kind, place in (("proc", "proc"), ("devtmpfs", "dev")):
        mirror.run("mount", "-t", kind, kind, str(root / place))
    try:
        yield
    finally:
        for place in ("proc", "dev"):
            mirror.run("umount", str(root / place))


def inside(root, *argv, **environment):
    """Run ``argv`` in ``root``."""
    return mirror.run("chroot", str(root), *argv, env={**ENVIRONMENT, **environment})


def unpack(debs, root):
    """Lay the files of packages over ``root``; no script of theirs runs."""
    for deb in sorted(debs):
        files = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE)
        tar = ["tar", "--extract", "--keep-directory-symlink", "--directory", str(root)]
        mirror.run(*tar, stdin=files.stdout)
        if files.wait():
            raise RuntimeError(f"{os.path.basename(deb)} could not be unpacked")
