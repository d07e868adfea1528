"""Loads the files under test as Salt's loader does: with the names in them that Salt puts there."""

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]


def load_file(path, **names):
    """Return a fresh copy of a file, such as ``_modules/zfs_dr.py``, with names such as ``__salt__``."""
    spec = importlib.util.spec_from_file_location(f"loaded_{pathlib.Path(path).stem}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    defaults = {"__salt__": {}, "__opts__": {"test": False}, "__pillar__": {}, "__context__": {}}
    vars(module).update({**defaults, **names})
    return module


@pytest.fixture
def load():
    return load_file
