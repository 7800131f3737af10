"""Running and comparing models in onnxruntime with our operator library."""
