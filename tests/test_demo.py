"""The demo at full length: zero-shot accuracy from prompts alone, and a control that can know nothing."""

import runpy
from pathlib import Path

import pytest

from benchmarks.demo import run
from clip_jax.config import from_config_dict

DEMO = Path(__file__).parent.parent / "configs" / "demo.py"


@pytest.fixture
def config(digits_dir):
    return from_config_dict(runpy.run_path(str(DEMO))["get_config"](f"data_dir={digits_dir}"))


@pytest.mark.slow
def test_held_out_scans_are_classified_in_wordings_never_seen(config):
    found = run(config, permuted=False)
    print(found)
    assert found["digits"] >= 0.95
    assert found["digits_unseen"] >= 0.95


@pytest.mark.slow
def test_with_permuted_captions_accuracy_is_chance(config):
    """Ten classes, so chance is 10 %; an arbitrary map from prompts to kinds of scans can be somewhat luckier."""
    found = run(config, permuted=True)
    print(found)
    assert found["digits"] < 0.25
    assert found["digits_unseen"] < 0.25
