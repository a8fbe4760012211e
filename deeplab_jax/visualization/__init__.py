"""Overlays of predictions on images, grids of images, and charts."""
