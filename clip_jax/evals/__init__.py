"""What a model can do without further training."""
