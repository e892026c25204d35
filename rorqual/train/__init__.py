"""Floor 3: numbers to gradients to weights."""
