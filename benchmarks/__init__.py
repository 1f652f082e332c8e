"""What a training step costs, beside TRL and beside its own arithmetic: `python -m benchmarks`, `make benchmark`."""
