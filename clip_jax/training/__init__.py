"""What a training step computes: losses, gradients, optimizer, state."""
