"""One module per data set, and the modules that they share."""
