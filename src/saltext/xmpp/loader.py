"""
Where Salt's loader finds this extension when pip installed it: the entry point ``salt.loader`` of pyproject.toml.

``python3 -m saltext.xmpp.loader`` prints the directory of the formula, for ``file_roots``.
"""

from pathlib import Path

INSTALLED = Path(__file__).resolve().parent
CHECKOUT = INSTALLED.parents[2]  # pip install -e
PLACES = {
    "modules": [INSTALLED / "modules", CHECKOUT / "_modules"],
    "states": [INSTALLED / "states", CHECKOUT / "_states"],
    "formula": [INSTALLED / "formula", CHECKOUT / "salt"],
}


def module_dirs():
    """Return a dict of loader types (``modules``, ``states``), each a list of directories, as Salt's loader asks."""
    return {kind: [directory(kind)] for kind in ("modules", "states")}


def directory(part):
    """Return the path of ``modules``, ``states`` or ``formula``: beside this file, or in the checkout."""
    return str(next(place for place in PLACES[part] if place.is_dir()))


if __name__ == "__main__":
    print(directory("formula"))
