"""A page that segments images in the browser, with an exported model."""
