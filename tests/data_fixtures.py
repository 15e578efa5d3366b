"""Fixtures around the embedded dataset, built once a session."""

import os

import pytest

from clip_jax.data.build import ensure_dataset


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """The folder that holds the prepared `digits`, shared by the workers of pytest-xdist: builds may race."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "datasets"
    ensure_dataset("digits", str(root))
    return root
