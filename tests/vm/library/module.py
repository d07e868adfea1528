"""OpenZFS's kernel module, compiled for Debian's cloud kernel: Debian has it as source only."""

import os

from tests.lab.library import cache, mirror, roots

from . import folders, packages

# Symbols for a debugger (and BTF, which is made from them) would take a third of the time.
SCRIPT = """
set -eu
cd /usr/src/zfs-*
kernel=$(ls -d /usr/src/linux-headers-*-cloud-amd64)
sed -i /^CONFIG_DEBUG_INFO/d "$kernel/include/config/auto.conf"
./configure --quiet --with-config=kernel --with-linux="${kernel%-cloud-amd64}-common" --with-linux-obj="$kernel"
make --silent --jobs="$JOBS" -C module
find module -name '*.ko' -exec strip --strip-debug {} + -exec cp -t /package/usr/lib/modules/*/updates {} +
"""
CONTROL = """\
Package: zfs-modules
Version: {version}
Architecture: amd64
Maintainer: nobody <nobody@invalid>
Description: OpenZFS for Linux {kernel}
"""
NAME = "zfs-modules.deb"


def versions(release):
    """Return the versions of the kernel and of OpenZFS that Debian has for ``release``."""
    build = packages.get(release) / "build"
    (kernel,) = build.glob("linux-headers-*-cloud-amd64_*_amd64.deb")
    (source,) = build.glob(f"{packages.LISTS['build']['source']}_*.deb")
    return kernel.name.split("_")[0].removeprefix("linux-headers-"), source.name.split("_")[1]


def key(release):
    """Return the cache key of the module for ``release``: it stays the same when only the image changes."""
    build = packages.get(release) / "build"
    return cache.digest(
        sorted(deb.name for deb in build.iterdir() if deb.name.startswith(("linux-", "gcc-", "zfs-"))), SCRIPT, CONTROL
    )


def get(release):
    """Return the package with the module for ``release``."""
    return cache.get(f"vm-module-{release}", key(release), lambda folder: build(release, folder)) / NAME


def build(release, folder):
    """Compile, and make a package of it: then zfs-initramfs needs no compiler in the image."""
    kernel, version = versions(release)
    with folders.upon(roots.get(release), folder / ".builder") as root:
        folders.unpack((packages.get(release) / "build").iterdir(), root)
        package = root / "package"
        (package / f"usr/lib/modules/{kernel}/updates").mkdir(parents=True)
        with folders.alive(root):
            folders.inside(root, "sh", "-c", SCRIPT, JOBS=str(os.cpu_count()))
        (package / "DEBIAN").mkdir()
        (package / "DEBIAN/control").write_text(CONTROL.format(version=version, kernel=kernel))
        mirror.run("dpkg-deb", "--root-owner-group", "-Zgzip", "--build", str(package), str(folder / NAME))
