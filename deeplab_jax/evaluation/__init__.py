"""Evaluation of models: protocols, metrics, reports and VOC's test server."""
