"""
States of what belongs to the service as a whole: secrets, certificates, packages, the database's cluster
=========================================================================================================
"""

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "xmpp"
__running__ = {}  # Salt puts the results of this run's states here.


def __virtual__():
    return __virtualname__


def loaded(name):
    """
    The extension's own execution modules can be called from states. Where they came along in this very run, they cannot
    yet: then this changes, and with ``reload_modules`` Salt loads all of them afresh.

    name
        A name for the state.

    .. code-block:: yaml

        xmpp_modules:
          xmpp.loaded:
            - order: first
            - reload_modules: True
    """
    missing = [each for each in ("xmpp.settings", "ejabberd.status") if each not in __salt__]
    if not missing:
        return {"name": name, "changes": {}, "result": True, "comment": "The modules are loaded"}
    result = None if __opts__["test"] else True
    return {"name": name, "changes": {"modules": "loaded"}, "result": result, "comment": "The modules are new here"}


def secret(name, contents_pillar=None, make=None):
    """
    A secret's file is there, root's own and mode 0600. What it holds is shown nowhere.

    name
        The file, as an absolute path.

    contents_pillar
        The colon path in the pillar of its value. Default: none.

    make
        What to make when the pillar has no value and the file is not there: ``password``, ``token`` or ``cookie``.
        Default: nothing; then the pillar must have it.

    .. code-block:: yaml

        /etc/salt/xmpp/secrets/admin_password:
          xmpp.secret:
            - contents_pillar: xmpp:secrets:admin_password
            - make: password
    """
    ret = {"name": name, "changes": {}, "result": True, "comment": "The secret is there"}
    found = __salt__["xmpp.secret_state"](name, contents_pillar)
    if found == "ready":
        return ret
    did = {"absent": "written", "differs": "replaced by the pillar's", "unprotected": "protected (root, 0600)"}[found]
    ret["changes"] = {name: did}
    if __opts__["test"]:
        ret.update(result=None, comment=f"The secret would be {did}")
        return ret
    try:
        __salt__["xmpp.secret_write"](name, contents_pillar=contents_pillar, make=make)
    except (CommandExecutionError, SaltInvocationError) as error:
        ret.update(result=False, changes={}, comment=str(error))
        return ret
    found = __salt__["xmpp.secret_state"](name, contents_pillar)
    ret.update(
        result=found == "ready", comment=f"The secret was {did}" if found == "ready" else f"The secret is {found}"
    )
    return ret


def certificate(name, certificate, key, host_names=None, group="root", fallback_certificate=None, fallback_key=None):
    """
    A program has its own copy of a certificate with its chain and key, in one PEM file, proven to be usable.

    name
        The copy, as an absolute path.

    certificate, key
        PEM files: the server's certificate with its chain, and its private key.

    host_names
        What it must carry. Default: anything.

    group
        The group that may read the copy. Default: root.

    fallback_certificate, fallback_key
        What to take for as long as ``certificate`` is not there. Default: nothing; it must be there.

    .. code-block:: yaml

        /etc/ejabberd/certificate.pem:
          xmpp.certificate:
            - certificate: /etc/ssl/xmpp/internal.crt
            - key: /etc/salt/xmpp/secrets/internal_key
            - group: ejabberd
    """
    ret = {"name": name, "changes": {}, "result": True, "comment": "The certificate is in place"}
    if fallback_certificate and not __salt__["file.file_exists"](certificate):
        certificate, key = fallback_certificate, fallback_key
    try:
        if __opts__["test"] and _will_change(certificate, key):
            ret.update(result=None, changes={name: "written"}, comment=f"{certificate} would be copied once it is made")
            return ret
        info = __salt__["xmpp.certificate_info"](certificate, key, host_names)
        if __salt__["xmpp.certificate_installed"](name, certificate, key, group):
            return ret
        ret["changes"] = {name: {"sha256": info["sha256"], "days_left": round(info["days_left"])}}
        if __opts__["test"]:
            ret.update(result=None, comment="The certificate would be replaced")
            return ret
        __salt__["xmpp.certificate_install"](name, certificate, key, host_names, group)
    except CommandExecutionError as error:
        ret.update(result=False, changes={}, comment=f"{error}. What {name} holds is as it was")
        return ret
    ret["comment"] = f"The certificate was replaced; it is valid for {info['days_left']:.0f} days"
    return ret


def _will_change(*files):
    """Tell whether a state of this run in test mode, which came before, would have changed one of the files."""
    return any(state.get("name") in files and state.get("result") is None for state in __running__.values())


def installed(name, pkgs, hold=None, minimum=None, disable=None):
    """
    Debian packages are installed, without their services having been started.

    A service that its package starts runs with the package's configuration: an ejabberd would get a node name that it
    cannot lose, and listen to the world.

    name
        A name for the state.

    pkgs
        A list of package names.

    hold
        A list of those that no ``apt-get upgrade`` may change. Default: none.

    minimum
        A map of package to the lowest version that will do. Default: any.

    disable
        A list of services that the packages enable and that shall not start at boot, before they are configured: what
        an image needs that is baked with them. Only when the packages come in, and where systemd runs. Default: none.

    .. code-block:: yaml

        ejabberd_packages:
          xmpp.installed:
            - pkgs: [ejabberd, erlang-p1-pgsql]
            - hold: [ejabberd]
            - minimum: {ejabberd: '24.12'}
    """
    ret = {"name": name, "changes": {}, "result": True, "comment": "All packages are installed"}
    missing = [package for package in pkgs if not __salt__["pkg.version"](package)]
    loose = sorted(set(hold or []) - set(__salt__["pkg.get_selections"](state="hold").get("hold", [])))
    interrupted = __salt__["xmpp.packages_interrupted"]()
    if _too_old(ret, minimum):
        return ret
    if __opts__["test"]:
        if missing or loose or interrupted:
            ret["changes"] = dict.fromkeys(missing, "installed") | dict.fromkeys(loose, "held")
            ret.update(result=None, comment=f"Would be installed: {_list(missing)}; would be held: {_list(loose)}")
        if interrupted:
            ret["changes"]["policy-rc.d"] = "removed"
        return ret
    try:
        if missing or interrupted:
            ret["changes"] = __salt__["xmpp.packages_install"](missing)
        if missing:
            # Without systemd, Salt could not enable it again: that needs insserv, which Debian does not install.
            for service in (disable or []) if __salt__["file.directory_exists"]("/run/systemd/system") else []:
                __salt__["service.disable"](service)
        if interrupted:
            ret["changes"]["policy-rc.d"] = "removed"
        if _too_old(ret, minimum):
            return ret
        for package in loose:
            __salt__["pkg.set_selections"](selection=f'{{"hold": ["{package}"]}}')
            ret["changes"].setdefault(package, "held")
    except CommandExecutionError as error:
        ret.update(result=False, comment=str(error))
        return ret
    if missing or loose or interrupted:
        ret["comment"] = f"Installed: {_list(missing)}; held: {_list(loose)}"
    if interrupted:
        ret["comment"] += "; what an interrupted installation left was put right"
    return ret


def _too_old(ret, minimum):
    """Tell whether a package is there in a version that will not do, and say so in ``ret``."""
    versions = {package: __salt__["pkg.version"](package) for package in minimum or {}}
    too_old = [
        f"{package} {version}, expected {minimum[package]}"
        for package, version in versions.items()
        if version and __salt__["pkg.version_cmp"](version, minimum[package]) < 0
    ]
    if too_old:
        advice = "upgrade it by hand, for it may have data to move"
        ret.update(result=False, comment=f"Too old: {', '.join(too_old)} or newer; {advice}")
    return bool(too_old)


def _list(names):
    return ", ".join(names) or "nothing"


def postgres_cluster(name, version, port=None):
    """
    A PostgreSQL cluster is there. One that exists is used as it is; what it lacks is told as a warning.

    name
        The cluster's name.

    version
        PostgreSQL's major version.

    port
        The port of one that is made. Default: the first that no cluster has, from 5432 on.

    .. code-block:: yaml

        main:
          xmpp.postgres_cluster:
            - version: '17'
    """
    version = str(version)
    ret = {"name": name, "changes": {}, "result": True, "comment": f"PostgreSQL {version}/{name} is there"}
    if __salt__["xmpp.postgres_cluster_exists"](version, name):
        lacks = __salt__["xmpp.postgres_cluster_lacks"](version, name)
        if lacks:
            ret["warnings"] = [f"PostgreSQL {version}/{name} was there before and lacks {each}" for each in lacks]
        return ret
    ret["changes"] = {f"{version}/{name}": "created"}
    if __opts__["test"]:
        ret.update(result=None, comment=f"PostgreSQL {version}/{name} would be created")
        return ret
    try:
        __salt__["xmpp.postgres_cluster_create"](version, name, port)
    except CommandExecutionError as error:
        ret.update(result=False, changes={}, comment=str(error))
        return ret
    ret["comment"] = f"PostgreSQL {version}/{name} was created"
    return ret


def source(name, suite, codename):
    """
    apt knows a further suite of the mirror that this machine already uses, or had it before.

    name
        The file, such as ``/etc/apt/sources.list.d/xmpp.sources``.

    suite, codename
        As for :func:`xmpp.suite_source <xmpp_packages.suite_source>`.

    .. code-block:: yaml

        /etc/apt/sources.list.d/xmpp.sources:
          xmpp.source:
            - suite: bookworm-backports
            - codename: bookworm
    """
    try:
        wanted = __salt__["xmpp.suite_source"](suite, codename)
    except CommandExecutionError as error:
        return {"name": name, "changes": {}, "result": False, "comment": str(error)}
    if not wanted:
        return {"name": name, "changes": {}, "result": True, "comment": f"This machine has {suite} already"}
    return __states__["file.managed"](name, contents=wanted, mode="0644")
