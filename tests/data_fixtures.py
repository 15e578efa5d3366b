"""Fixtures of data: the embedded dataset, built once a session, and a store in memory."""

import os

import fsspec
import pytest

from clip_jax.data.build import ensure_dataset


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The URL of a folder in a store in memory; what is downloaded goes into `cache`."""
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
    yield f"memory://{tmp_path.name}"
    if fsspec.filesystem("memory").exists(f"/{tmp_path.name}"):
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """The folder that holds the prepared `digits`, shared by the workers of pytest-xdist: builds may race."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "datasets"
    ensure_dataset("digits", str(root))
    return root
