"""Inference with trained models on images of any size."""
