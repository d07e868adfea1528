"""What pypi.lab offers: the files that pip, under the Python of each release, takes from this machine's own index.

Source distributions stay source distributions: a host must bring what it takes to build them, as it must outside.
"""

import os
import pathlib
import shutil
import subprocess
import tarfile
import tomllib

from . import cache, mirror
from .mirror import run
from .packages import LISTS, REQUIREMENTS


def key(release):
    """Return the cache key of the index of ``release``."""
    return cache.digest(release, LISTS["python"], REQUIREMENTS.read_text(), pathlib.Path(__file__).read_text())


def get(release):
    """Return the folder of the Python packages for ``release``."""
    return cache.get(f"index-{release}", key(release), lambda folder: build(release, folder))


def build(release, folder):
    """Fill ``folder``; runs pip in a root of ``release`` that has this machine's network."""
    root = folder / ".root"
    mirror.debootstrap(release, root, ["ca-certificates", "python3-venv"])
    for name in ("etc/resolv.conf", "etc/hosts", "etc/pip.conf", "etc/ssl/certs/ca-certificates.crt"):
        if pathlib.Path("/", name).exists():
            shutil.copy(f"/{name}", root / name)
    shutil.copy(REQUIREMENTS, root / "requirements.txt")
    for kind, place in (("proc", "proc"), ("devtmpfs", "dev")):
        run("mount", "-t", kind, kind, str(root / place))
    try:
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "PIP_CERT": "/etc/ssl/certs/ca-certificates.crt",
        }
        # Where this machine's pip finds its packages may be said in the environment.
        environment |= {
            name: value
            for name, value in os.environ.items()
            if name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST") or name.lower().endswith("_proxy")
        }
        # Ten tries take two minutes: a name server may be away for one.
        download = ["--quiet", "--retries=10", "download", "--no-cache-dir", "--dest", "/packages"]
        pip = ("chroot", str(root), "/venv/bin/pip", *download)
        run("chroot", str(root), "python3", "-m", "venv", "/venv", env=environment)
        run(*pip, "--requirement", "/requirements.txt", *LISTS["python"]["packages"], env=environment)
        run(*pip, *build_requirements(root / "packages"), env=environment)
    finally:
        for place in ("proc", "dev"):
            subprocess.run(["umount", str(root / place)], check=False)
    for file in (root / "packages").iterdir():
        file.rename(folder / file.name)
    shutil.rmtree(root)


def build_requirements(folder):
    """Return what the source distributions in ``folder`` say that they need to be built."""
    found = set()
    for file in folder.glob("*.tar.gz"):
        with tarfile.open(file) as archive:
            name = f"{archive.getnames()[0].split('/')[0]}/pyproject.toml"
            project = tomllib.load(archive.extractfile(name)) if name in archive.getnames() else {}
        found.update(project.get("build-system", {}).get("requires", ["setuptools"]))
    return sorted(found)
