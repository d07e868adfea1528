"""Builds what the machines need, for tests/run and by hand."""

import concurrent.futures

from tests.lab.library import index, mirror, roots
from tests.lab.library.packages import RELEASES

from . import module, template


def build(releases=RELEASES):
    """Build what ``releases`` need and the cache lacks."""
    mirror.signing_key()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(one, releases))


def one(release):
    """Build what one release needs: the kernel module takes longest, so the rest is made beside it."""
    roots.get(release)
    with concurrent.futures.ThreadPoolExecutor() as side:
        compiled = side.submit(module.get, release)
        # Before the layer, which is made on a host of the lab: from there nothing outside can be reached.
        mirror.get(release)
        index.get(release)
        roots.get(f"{release}+salt")
        compiled.result()
    template.get(release)
