"""Benchmarks: each one answers a question with a ratio against a named baseline, measured in the same run."""
