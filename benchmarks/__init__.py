"""Benchmarks: `python -m benchmarks NAME…`, or `make bench`. Every figure is a ratio measured in one run."""
