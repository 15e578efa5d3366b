"""CLIP's towers and their sizes."""
