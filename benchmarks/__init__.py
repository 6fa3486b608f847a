"""Every published number has its script here: python -m benchmarks."""
