"""A partial copy of the Debian mirror that this machine uses, signed by a key of the lab.

Stanzas, paths and Release fields are the mirror's own; only what was not copied is left out. So to a host it is a
mirror like any other.
"""

import gzip
import hashlib
import os
import pathlib
import subprocess

from . import cache
from .packages import LISTS

KEYRING = "lab-archive-keyring.gpg"
RELEASE_FIELDS = (
    "Origin", "Label", "Suite", "Version", "Codename", "Date", "NotAutomatic", "ButAutomaticUpgrades", "Components",
    "Description",
)  # fmt: skip


def run(*argv, **options):
    """Run ``argv`` and return its output; its errors are shown when it fails."""
    done = subprocess.run(argv, text=True, capture_output=True, **options)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return done.stdout


def signing_key():
    """Return the folder of the key that signs the mirrors (a GnuPG home and the public key as ``KEYRING``)."""

    def build(folder):
        gpg = ("gpg", "--homedir", str(folder), "--batch", "--quiet", "--passphrase", "")
        folder.chmod(0o700)
        run(*gpg, "--quick-gen-key", "Lab archive", "rsa3072", "sign", "never")
        run(*gpg, "--output", str(folder / KEYRING), "--export")
        run("gpgconf", "--homedir", str(folder), "--kill", "all")

    return cache.get("signing-key", "1", build)


def key(release):
    """Return the cache key of the mirror of ``release``."""
    sets = [LISTS[name] for name in ("base", "apps", "tools", "init")]
    return cache.digest(release, sets, pathlib.Path(__file__).read_text(), (signing_key() / KEYRING).read_bytes())


def get(release):
    """Return the folder of the mirror of ``release``, laid out as it is served."""
    signing_key()
    return cache.get(f"mirror-{release}", key(release), lambda folder: build(release, folder))


def upstream():
    """Return the address of the Debian archive and of its security archive, as this machine's apt has them."""
    found = {}
    targets = run(
        "apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)", "Created-By: Packages"
    )
    rows = [line.split() for line in targets.splitlines()]
    # Repositories that say they are Debian's come first; before the first "apt-get update" none says anything.
    for uri, suite, component, *_ in sorted(rows, key=lambda row: row[3:] != ["Debian"]):
        if component == "main":
            found.setdefault("security" if "security" in suite else "main", uri)
    if set(found) != {"main", "security"}:
        raise RuntimeError(f"the apt sources of this machine name no Debian archive with security updates: {rows}")
    return found


def suites(release):
    """Return the suites of ``release``, backports last: pairs of the path where it is served and its name."""
    return [
        ("debian", release),
        ("debian", f"{release}-updates"),
        ("debian-security", f"{release}-security"),
        ("debian", f"{release}-backports"),
    ]


def build(release, folder):
    """Fill ``folder`` with the mirror of ``release``."""
    apt = Apt(release, folder / ".apt")
    apt.download()
    debs = {tuple(deb.stem.replace("%3a", ":").split("_")): deb for deb in apt.archives.glob("*.deb")}
    for path, suite in suites(release):
        packages, release_file = apt.index(suite)
        kept = [s for s in packages.split("\n\n") if identity(s) in debs]
        for stanza in kept:
            target = folder / path / field(stanza, "Filename")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                os.link(debs[identity(stanza)], target)
        publish(folder / path / "dists" / suite, kept, release_file, apt.architecture)
    (folder / KEYRING).write_bytes((signing_key() / KEYRING).read_bytes())
    run("rm", "--recursive", str(folder / ".apt"))


def debootstrap(release, root, packages, *options):
    """Make a minimal ``release`` with ``packages`` in the folder ``root`` from the lab's mirror."""
    source = get(release)
    signed_by = f"[signed-by={source / KEYRING}]"
    # apt's recommendations stay out; "copy" because the mirror is not inside the root.
    run(
        "mmdebstrap", "--quiet", "--mode=root", "--variant=apt", f"--include={','.join(packages)}",
        "--dpkgopt=force-unsafe-io", "--aptopt=APT::Install-Recommends false", *options, release, str(root),
        *(f"deb {signed_by} copy://{source}/{path} {suite} main" for path, suite in suites(release)[:-1]),
    )  # fmt: skip


def field(stanza, name):
    """Return the value of the one-line field ``name``, or None."""
    for line in stanza.splitlines():
        if line.startswith(f"{name}: "):
            return line[len(name) + 2 :]
    return None


def identity(stanza):
    """Return name, version and architecture, which are the parts of a package's file name."""
    return tuple(field(stanza, name) for name in ("Package", "Version", "Architecture"))


def publish(folder, stanzas, release_file, architecture):
    """Write the index of one suite and sign it."""
    index = folder / f"main/binary-{architecture}"
    index.mkdir(parents=True)
    content = "".join(f"{stanza.strip()}\n\n" for stanza in stanzas).encode()
    (index / "Packages").write_bytes(content)
    (index / "Packages.gz").write_bytes(gzip.compress(content, mtime=0))
    lines = [f"{name}: {value}" for name in RELEASE_FIELDS if (value := field(release_file, name))]
    lines += [f"Architectures: {architecture}", "SHA256:"]
    for file in sorted(index.iterdir()):
        data = file.read_bytes()
        lines.append(f" {hashlib.sha256(data).hexdigest()} {len(data)} {file.relative_to(folder)}")
    (folder / "Release").write_text("\n".join(lines) + "\n")
    home = signing_key()
    gpg = (
        "gpg",
        "--homedir",
        str(home),
        "--batch",
        "--quiet",
        "--yes",
        "--passphrase",
        "",
        "--pinentry-mode",
        "loopback",
    )
    with cache.lock(home / ".lock"):
        run(*gpg, "--output", str(folder / "InRelease"), "--clearsign", str(folder / "Release"))
        run("gpgconf", "--homedir", str(home), "--kill", "all")


class Apt:
    """An apt that knows nothing of this machine's packages and downloads for ``release``."""

    def __init__(self, release, folder):
        self.release = release
        self.architecture = run("dpkg", "--print-architecture").strip()
        self.archives = folder / "cache/archives"
        self.preferences = folder / "preferences"
        for name in ("state/lists/partial", "cache/archives/partial", "no-parts"):
            (folder / name).mkdir(parents=True)
        (folder / "status").touch()
        archive = upstream()
        keyring = next(pathlib.Path("/usr/share/keyrings").glob("debian-archive-keyring.*"))
        (folder / "sources.list").write_text(
            "".join(
                f"deb [signed-by={keyring}] {archive['security' if 'security' in path else 'main']} {suite} main\n"
                for path, suite in suites(release)
            )
        )
        # The machine's own apt.conf.d stays in force: it may name a proxy.
        options = {
            "Dir::State": f"{folder}/state",
            "Dir::State::status": f"{folder}/status",
            "Dir::Cache": f"{folder}/cache",
            "Dir::Etc::sourcelist": f"{folder}/sources.list",
            "Dir::Etc::sourceparts": f"{folder}/no-parts",
            "Dir::Etc::preferences": f"{self.preferences}",
            "Dir::Etc::preferencesparts": f"{folder}/no-parts",
            "Acquire::Languages": "none",
            "APT::Sandbox::User": "root",
            "Acquire::Retries": "3",
        }
        self.options = [f"--option={name}={value}" for name, value in options.items()]
        run("apt-get", *self.options, "--quiet=2", "update")

    def download(self):
        """Download every set with all that it needs on a machine that has nothing."""
        stanzas = run("apt-cache", *self.options, "dumpavail").split("\n\n")
        essential = sorted(
            {
                field(s, "Package")
                for s in stanzas
                if field(s, "Essential") == "yes" or field(s, "Priority") == "required"
            }
        )
        base, apps, tools = (LISTS[name] for name in ("base", "apps", "tools"))
        bare = [*essential, *base["packages"]]
        self.install(*bare)
        self.install("--install-recommends", *bare, *apps["packages"])
        self.preferences.write_text(
            f"Package: {apps['backports']}\nPin: release n={self.release}-backports\nPin-Priority: 990\n"
        )
        self.install(*bare, *apps["packages"])
        self.preferences.write_text("")
        self.install(*bare, *tools["packages"])
        self.install(*essential, *LISTS["init"]["packages"])

    def install(self, *argv):
        """Download what ``apt-get install`` with ``argv`` would install."""
        run(
            "apt-get",
            *self.options,
            "--quiet=2",
            "--yes",
            "--download-only",
            "--no-install-recommends",
            "install",
            *argv,
        )

    def index(self, suite):
        """Return the Packages file and the Release file of ``suite`` as the upstream mirror has them."""
        described = "$(FILENAME) $(RELEASE)"
        rows = run("apt-get", *self.options, "indextargets", "--format", described, "Created-By: Packages").splitlines()
        packages = next(name for name, of in map(str.split, rows) if of == suite)
        in_release = pathlib.Path(packages.split(f"_{suite}_")[0] + f"_{suite}_InRelease")
        return run("/usr/lib/apt/apt-helper", "cat-file", packages), in_release.read_text()
