"""What the mirror, the index and the roots hold: tests/lab/packages.toml."""

import pathlib
import tomllib

LAB = pathlib.Path(__file__).resolve().parent.parent
CHECKOUT = LAB.parent.parent
LISTS = tomllib.loads((LAB / "packages.toml").read_text())
RELEASES = LISTS["releases"]
REQUIREMENTS = CHECKOUT / "tests/requirements.txt"
