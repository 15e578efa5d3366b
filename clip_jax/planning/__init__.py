"""What a run needs, found by compiling it for machines that need not be there."""
