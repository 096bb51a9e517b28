"""Child processes of these tests run in folders of their own and must still find the package under test."""

import os
from pathlib import Path

import pytest

import recollect


@pytest.fixture(autouse=True, scope="session")
def package_for_children():
    """Put the folder that holds the imported package first on the children's path."""
    before = os.environ.get("PYTHONPATH")
    found = str(Path(recollect.__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([found, before] if before else [found])
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
