"""All that is to be said stands in pyproject.toml; this file is for the tools that ask for one."""

from setuptools import setup

setup()
