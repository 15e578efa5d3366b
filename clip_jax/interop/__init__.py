"""The interop room: weights in and out of other projects' formats."""
