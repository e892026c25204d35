"""Benchmarks and long proofs; results with their command, commit and machine go to benchmarks/results/."""
