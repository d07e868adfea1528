"""The root file systems of hosts: a bare Debian of each release, and layers upon it.

A layer is what the script tests/lab/layers/NAME leaves behind on a host of the layers below it. "trixie+salt+apps"
names a stack. The first line of a script names the files that, besides itself, it is made from.
"""

import multiprocessing
import pathlib

from . import cache, index, mirror
from .packages import CHECKOUT, LAB, LISTS, RELEASES

LAYERS = LAB / "layers"
SOURCES = """\
Types: deb
URIs: http://mirror.lab/debian
Suites: {release} {release}-updates
Components: main
Signed-By: /usr/share/keyrings/{keyring}

Types: deb
URIs: http://mirror.lab/debian-security
Suites: {release}-security
Components: main
Signed-By: /usr/share/keyrings/{keyring}
"""
# What Debian's slim images leave out.
EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/lintian/*")
# What a machine does not take with it into an image.
CLEAN = """
apt-get clean
rm -rf /var/lib/apt/lists/* /root/.cache /tmp/* /var/tmp/*
: > /etc/machine-id
"""
PIP = "[global]\nindex-url = http://pypi.lab/simple/\ntrusted-host = pypi.lab\n"
# Nothing on a host shall start by the clock alone while a test looks at it.
MASKED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "systemd-timesyncd.service",
)


def get(stack):
    """Return the lower folders of ``stack`` ("bookworm+salt+apps"), topmost first, building what is missing."""
    stack = normal(stack)
    below, _, layer = stack.rpartition("+")
    if not below:
        return [str(cache.get(f"root-{stack}", key(stack), lambda folder: base(stack, folder)) / "root")]
    lower = get(below)
    return [str(cache.get(f"root-{stack}", key(stack), lambda folder: add(below, layer, folder)) / "root"), *lower]


def normal(stack):
    """Return ``stack`` with its layers in the order in which they are built, or say what is wrong with it."""
    release, *layers = stack.split("+")
    if release not in RELEASES or not set(layers) <= set(LISTS["layers"]):
        raise ValueError(f"{stack}: a stack is one of {RELEASES}, then any of {LISTS['layers']}, joined by +")
    return "+".join([release, *sorted(set(layers), key=LISTS["layers"].index)])


def key(stack):
    """Return the cache key of the topmost layer of ``stack``, as ``normal`` has it."""
    below, _, layer = stack.rpartition("+")
    if not below:
        return cache.digest(mirror.key(stack), LISTS["base"], pathlib.Path(__file__).read_text())
    script = (LAYERS / layer).read_text()
    inputs = [(CHECKOUT / name).read_text() for name in script.splitlines()[0].removeprefix("# inputs:").split()]
    return cache.digest(key(below), index.key(below.split("+")[0]), script, inputs)


def base(release, folder):
    """Make the bare Debian of ``release``."""
    root = folder / "root"
    mirror.debootstrap(
        release, root, LISTS["base"]["packages"], *(f"--dpkgopt=path-exclude={path}" for path in EXCLUDED)
    )
    files = {
        "etc/apt/sources.list.d/debian.sources": SOURCES.format(release=release, keyring=mirror.KEYRING),
        "etc/dpkg/dpkg.cfg.d/slim": "".join(f"path-exclude={path}\n" for path in EXCLUDED) + "force-unsafe-io\n",
        "etc/pip.conf": PIP,
        "etc/machine-id": "",
        "etc/resolv.conf": "",
        "etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=persistent\nRateLimitBurst=0\n",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    (root / "usr/share/keyrings" / mirror.KEYRING).write_bytes((mirror.get(release) / mirror.KEYRING).read_bytes())
    for name in (
        "etc/apt/sources.list",
        "etc/apt/apt.conf.d/99mmdebstrap",
        "etc/dpkg/dpkg.cfg.d/99mmdebstrap",
        "etc/hostname",
    ):
        (root / name).unlink(missing_ok=True)
    for unit in MASKED:
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")


def add(below, layer, folder):
    """Make ``layer`` upon the stack ``below``: run its script on a host and keep what it left."""
    # In a process of its own: the lab takes the process that makes it into another network.
    room = multiprocessing.get_context("spawn").Process(target=_add, args=(below, layer, folder))
    room.start()
    room.join()
    if room.exitcode:
        raise RuntimeError(f"the layer {layer} upon {below} could not be built; its reason is above")


def _add(below, layer, folder):
    from .lab import Lab  # the lab needs roots, and a layer needs a lab

    apps = LISTS["apps"]
    environment = {"LAYER_PACKAGES": " ".join(apps["packages"]), "LAYER_BACKPORTS": apps["backports"]}
    with Lab(releases=[below.split("+")[0]]) as lab:
        host = lab.host("build.lab", layers=below, init=None)
        host.sh((LAYERS / layer).read_text() + CLEAN, env=environment, timeout=1200)
        host.freeze(folder / "root")
