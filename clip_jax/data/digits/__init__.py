"""The embedded dataset: scikit-learn's scans of handwritten digits, with captions."""

VERSION = "1.0.0"
"""Raise it whenever a record changes, so that an old build is not taken for the new one."""
