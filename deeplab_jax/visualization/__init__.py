"""Pictures of labels, predictions and charts."""
