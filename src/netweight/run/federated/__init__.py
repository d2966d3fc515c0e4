"""Federated runs: clients keep their rows; only updates travel."""
