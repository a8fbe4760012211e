"""Export of trained models to StableHLO and ONNX files, which run without this package."""
