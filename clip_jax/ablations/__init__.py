"""The room of ablations: many runs from one file, and what they say together."""
