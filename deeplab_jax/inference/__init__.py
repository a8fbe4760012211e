"""Trained models on images of any size."""
