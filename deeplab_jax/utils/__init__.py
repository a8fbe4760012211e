"""Errors, atomic writes, downloads, progress bars and registries, used by all other packages."""
