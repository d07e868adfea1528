"""
Debian's packages: one more suite of the same mirror, and no service started by its package
===========================================================================================
"""

import contextlib
import glob
import os
import re

from salt.exceptions import CommandExecutionError

__virtualname__ = "xmpp"

SOURCES = "/etc/apt/sources.list.d/xmpp.sources"
POLICY = "/usr/sbin/policy-rc.d"
MARK = "# Put here by xmpp.packages_install; remove it if you find it while nothing is being installed."
ASIDE = POLICY + ".before-xmpp"
KEPT = {"signed-by": "Signed-By", "trusted": "Trusted", "architectures": "Architectures"}
OFF = ("no", "false", "without", "off", "disable", "0")  # apt's words for it


def __virtual__():
    return __virtualname__


def suite_source(suite, codename):
    """
    Describe a further suite of the mirror that this machine already uses, for apt.

    suite
        The suite, such as ``bookworm-backports``.

    codename
        The suite whose mirror, keyring and options are taken, such as ``bookworm``.

    Returns the text of a deb822 source (sources.list(5)), or an empty text when one of the machine's own sources has
    the suite.

    Raises ``CommandExecutionError`` when no source has ``codename``.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.suite_source bookworm-backports bookworm
    """
    sources = list(_sources())
    if any(suite in source["suites"] for source in sources):
        return ""
    mirrors = [source for source in sources if codename in source["suites"]]
    # A stranger's repository may name its suite after Debian's; what has the release's updates too is Debian's mirror.
    updated = {uri for source in sources if f"{codename}-updates" in source["suites"] for uri in source["uris"]}
    for source in [each for each in mirrors if updated.intersection(each["uris"])] or mirrors:
        fields = {
            "Types": "deb",
            "URIs": " ".join(source["uris"]),
            "Suites": suite,
            "Components": "main",
            **source["kept"],
        }
        return "".join(f"{key}: {value}\n".replace(": \n", ":\n") for key, value in fields.items())
    raise CommandExecutionError(
        f"None of the apt sources of this machine has {codename} main; expected one, to add {suite} from its mirror"
    )


def _sources():
    """
    Yield each source of this machine that has packages of ``main``, ours left out: a dict with the lists ``uris`` and
    ``suites``, and ``kept``, the fields of deb822 that hold for another suite of it too.
    """
    for path in ["/etc/apt/sources.list", *sorted(glob.glob("/etc/apt/sources.list.d/*"))]:
        if path == SOURCES or not os.path.isfile(path):
            continue
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
        found = _deb822(text) if path.endswith(".sources") else _one_line(text) if path.endswith(".list") else ()
        for uris, suites, components, kept in found:
            if "main" in components and not uris[0].startswith("cdrom:"):
                yield {"uris": uris, "suites": suites, "kept": {KEPT[key]: kept[key] for key in KEPT if kept.get(key)}}


def _deb822(text):
    text = re.sub(r"^#.*(\n|$)", "", text, flags=re.MULTILINE)
    for stanza in re.split(r"\n\s*\n", text):
        # A value may begin on the line below, as a key in Signed-By does; names of fields are in any case.
        lines = re.findall(r"^([\w-]+):[ \t]*(.*(?:\n[ \t]+.*)*)", stanza, re.MULTILINE)
        fields = {name.lower(): value.rstrip() for name, value in lines}
        uris, suites, components, types = (
            fields.get(name, "").split() for name in ("uris", "suites", "components", "types")
        )
        if uris and "deb" in types and fields.get("enabled", "yes").lower() not in OFF:
            yield uris, suites, components, fields


def _one_line(text):
    names = {"signed-by": "signed-by", "trusted": "trusted", "arch": "architectures"}
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^]]*)\]\s*)?(\S+)\s+(\S+)\s+([^#]+)", line)
        if match:
            options = dict(option.partition("=")[::2] for option in (match[1] or "").split())
            kept = {names[key]: value.replace(",", " ") for key, value in options.items() if key in names}
            yield [match[2]], [match[3]], match[4].split(), kept


def packages_interrupted():
    """
    Tell whether an installation by :func:`packages_install` was broken off and still keeps services from starting.

    Returns ``True`` or ``False``.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.packages_interrupted
    """
    return _ours()


def packages_install(packages):
    """
    Install Debian packages without letting them start the services that they bring (invoke-rc.d(8)).

    What an interrupted installation left unconfigured is configured first. Recommended packages are not installed.

    packages
        A list of package names; with none, only what was left behind is put right.

    Returns a dict of each package that changed: ``{name: {old: version, new: version}}``.

    Raises ``CommandExecutionError`` with apt's own words.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.packages_install '[nginx, libnginx-mod-stream]'
    """
    _services_deny()
    try:
        __salt__["cmd.run_all"](
            ["dpkg", "--force-confold", "--force-confdef", "--configure", "-a"],
            env={"DEBIAN_FRONTEND": "noninteractive"},
            python_shell=False,
        )
        changes = {}
        if packages:
            changes = __salt__["pkg.install"](pkgs=packages, refresh=True, install_recommends=False)
    finally:
        _services_allow()
    missing = [package for package in packages if not __salt__["pkg.version"](package)]
    if missing:
        raise CommandExecutionError(
            f"apt did not install {', '.join(missing)}; see what `apt-get install {' '.join(missing)}` says"
        )
    return changes


def _services_deny():
    if os.path.lexists(POLICY) and not _ours():
        os.replace(POLICY, ASIDE)
    with open(POLICY, "w", encoding="utf-8") as file:
        file.write(f"#!/bin/sh\n{MARK}\nexit 101\n")
    os.chmod(POLICY, 0o755)


def _services_allow():
    with contextlib.suppress(FileNotFoundError):
        os.remove(POLICY)
    if os.path.lexists(ASIDE):
        os.replace(ASIDE, POLICY)


def _ours():
    try:
        with open(POLICY, encoding="utf-8") as file:
            return MARK in file.read()
    except OSError:
        return False
