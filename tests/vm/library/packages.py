"""Debian's packages for the machines: a kernel, its headers, and OpenZFS, which is in the component contrib."""

import pathlib
import re
import tomllib

from tests.lab.library import cache, mirror, roots

HERE = pathlib.Path(__file__).resolve().parent
LISTS = tomllib.loads((HERE / "packages.toml").read_text())


def key(release):
    """Return the cache key of the packages for ``release``."""
    return cache.digest(roots.key(release), LISTS, pathlib.Path(__file__).read_text())


def get(release):
    """Return the folder with a folder of packages for each set of packages.toml: what a bare root lacks of it."""
    return cache.get(f"vm-packages-{release}", key(release), lambda folder: build(release, folder))


def build(release, folder):
    """Download into ``folder``."""
    apt = Apt(release, folder / ".apt")
    status = pathlib.Path(roots.get(release)[0], "var/lib/dpkg/status")
    (folder / ".apt/status").write_text(status.read_text())
    source = LISTS["build"]["source"]
    apt.install(*LISTS["build"]["packages"])
    take(apt, folder / "build")
    mirror.run("apt-get", *apt.options, "--quiet=2", "download", source, cwd=folder / "build")
    # There is no package with the kernel module in Debian: it is compiled here, see module.py.
    stanza = "Package: zfs-modules\nVersion: 1\nArchitecture: all\nStatus: install ok installed\nMaintainer: -\n"
    (folder / ".apt/status").write_text(status.read_text() + "\n" + stanza)
    apt.install(*LISTS["image"]["packages"])
    take(apt, folder / "image")
    mirror.run("rm", "--recursive", str(folder / ".apt"))


def take(apt, folder):
    """Move what ``apt`` downloaded to ``folder``."""
    folder.mkdir()
    for deb in apt.archives.glob("*.deb"):
        deb.rename(folder / deb.name)


class Apt(mirror.Apt):
    """The lab's, with contrib."""

    def __init__(self, release, folder):
        super().__init__(release, folder)
        sources = folder / "sources.list"
        sources.write_text(re.sub("main$", "main contrib", sources.read_text(), flags=re.MULTILINE))
        mirror.run("apt-get", *self.options, "--quiet=2", "update")
