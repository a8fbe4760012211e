"""The data sets, a module each, and what they share."""
