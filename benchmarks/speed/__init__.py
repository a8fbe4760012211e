"""Forward passes and training steps, in turns with torchvision's: `python -m benchmarks.speed`."""
