"""Analyzes models: strides, rates, fields of view and arithmetic, as tables and figures."""
