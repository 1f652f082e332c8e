"""Several processes (ranks) as one trainer."""
