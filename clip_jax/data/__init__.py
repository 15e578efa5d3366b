"""Records to batches: sources, images, captions, and the order in which they come."""
