"""Floor 4: benchmarks (tasks and a protocol) and their statistics."""
