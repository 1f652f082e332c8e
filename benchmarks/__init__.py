"""What one training step costs beside TRL and beside its own arithmetic: `python -m benchmarks`, or `make benchmark`."""
