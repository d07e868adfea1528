"""Salt's own loaders with this tree's modules and states, on a host with the applications, none configured."""

import pathlib

import pytest
import salt.config
from saltfactories.utils.functional import Loaders

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def minion_opts(tmp_path_factory):
    root = tmp_path_factory.mktemp("minion")
    pillar = root / "pillar"
    pillar.mkdir()
    (pillar / "top.sls").write_text("base: {'*': [given]}")
    (pillar / "given.sls").write_text("given: {password: from the pillar, other: another from the pillar}")
    opts = salt.config.DEFAULT_MINION_OPTS.copy()
    opts.update(
        id="host",
        root_dir=str(root),
        cachedir=str(root / "cache"),
        file_client="local",
        module_dirs=[str(ROOT / "_modules")],
        states_dirs=[str(ROOT / "_states")],
        pillar_roots={"base": [str(pillar)]},
    )
    return opts


@pytest.fixture(scope="session")
def session_loaders(minion_opts):
    return Loaders(minion_opts)


@pytest.fixture
def loaders(session_loaders):
    yield session_loaders
    session_loaders.reset_state()


@pytest.fixture
def states(loaders):
    return loaders.states
