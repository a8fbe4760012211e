"""Small things that all rooms use: errors, files, registries."""
