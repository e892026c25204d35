"""Floor 3: trajectories to numbers."""
