"""Image, mask and class files of users."""
