"""The tree by pip, in Salt's own Python: the same modules and the same formula as by a file server."""

import json
import re

import pytest

from . import service
from .delivery import changed, wrong

TREE = service.CHECKOUT_THERE
SALT_CALL = service.SALT_CALL
PYTHON = "/opt/salt-xmpp/bin/python3"


def call(host, config, function, *arguments, check=True):
    """Ask the minion without a master whose configuration is in ``config``."""
    words = ["--local", f"--config-dir={config}", "--out=json", "--log-level=quiet", function, *arguments]
    done = host.run(SALT_CALL, *words, check=check, timeout=900)
    return json.loads(done.stdout[done.stdout.index("{") :])["local"]


@pytest.fixture(scope="module")
def piped(lab, debian):
    """A machine whose Salt knows nothing of the tree, with a copy of it that pip may write to."""
    host = service.host(lab, f"{debian}+salt+apps", name="xmpp1.example.org")
    host.sh(f"cp -r {TREE} /root/tree; cd /root/tree; rm -rf .git build *.egg-info")
    host.put("/srv/pillar/top.sls", "base: {'*': [xmpp]}\n")
    host.put("/srv/pillar/xmpp.sls", (service.CHECKOUT / "pillar.example").read_text())
    yield host
    host.destroy()


def minion_configuration(host, name, *roots):
    settings = {
        "id": service.NODE,
        "file_client": "local",
        "file_roots": {"base": list(roots)},
        "pillar_roots": {"base": ["/srv/pillar"]},
        "cachedir": f"/var/cache/salt/{name}",
        "extension_modules": f"/var/cache/salt/{name}/extmods",
    }
    host.put(f"/etc/salt/{name}/minion", json.dumps(settings))
    return f"/etc/salt/{name}"


@pytest.mark.parametrize("editable", [False, True], ids=["install", "editable"])
def test_pip_delivers_what_a_file_server_delivers(piped, editable):
    files = minion_configuration(piped, "files", TREE, f"{TREE}/salt")
    call(piped, files, "saltutil.sync_all")
    piped.sh(f"cd /root; {PYTHON} -m pip install --quiet {'-e' if editable else ''} /root/tree", timeout=600)
    try:
        formula = piped.sh(f"cd /root; {PYTHON} -m saltext.xmpp.loader").stdout.strip()
        assert formula == "/root/tree/salt" if editable else formula.endswith("site-packages/saltext/xmpp/formula")
        pip = minion_configuration(piped, "pip", formula)
        for ask in ("sys.list_functions", "sys.list_state_functions"):
            functions = call(piped, pip, ask, "xmpp", "ejabberd")
            assert functions == call(piped, files, ask, "xmpp", "ejabberd")
            assert len(functions) > 2
        assert call(piped, pip, "xmpp.plan")["node"] == service.NODE
        low = call(piped, pip, "state.show_low_sls", "xmpp")
        assert [chunk["__id__"] for chunk in low] == [
            chunk["__id__"] for chunk in call(piped, files, "state.show_low_sls", "xmpp")
        ]
        # Not by a sync behind pip's back.
        found = piped.sh("find /var/cache/salt/pip/extmods -name '*.py' 2>/dev/null || true").stdout
        assert found == ""
        listed = piped.sh(f"cd /root; {PYTHON} -m pip show --files saltext-xmpp").stdout
        names = re.findall(r"^  (\S+)$", listed.partition("Files:")[2], re.MULTILINE)
        assert names
        assert not [name for name in names if name.startswith("salt/")]
    finally:
        piped.sh(f"cd /root; {PYTHON} -m pip uninstall --quiet --yes saltext-xmpp")
    assert call(piped, pip, "sys.list_functions", "xmpp") == []


def test_pip_delivery_makes_the_service(piped):
    piped.sh(f"cd /root; {PYTHON} -m pip install --quiet /root/tree", timeout=600)
    formula = piped.sh(f"cd /root; {PYTHON} -m saltext.xmpp.loader").stdout.strip()
    config = minion_configuration(piped, "pip", formula)
    assert wrong(call(piped, config, "state.apply", "xmpp", check=False)) == {}
    again = call(piped, config, "state.apply", "xmpp")
    assert (wrong(again), changed(again)) == ({}, {})
    assert call(piped, config, "xmpp.check", check=False)["ok"]


def test_the_version_is_that_of_pyproject(piped):
    version = re.search(r'^version = "(.+)"$', (service.CHECKOUT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert f"Version: {version}\n" in piped.sh(f"cd /root; {PYTHON} -m pip show saltext-xmpp").stdout
