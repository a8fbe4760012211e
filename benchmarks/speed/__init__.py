"""Compares the speed with torchvision's: `python -m benchmarks.speed`."""
