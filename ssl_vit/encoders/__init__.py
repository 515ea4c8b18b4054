"""Encoders: the networks that are trained, probed and exported. Only this package touches timm internals."""
