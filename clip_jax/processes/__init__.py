"""Several processes as one run, and their end: joining, noticing that one is gone or told to stop."""
