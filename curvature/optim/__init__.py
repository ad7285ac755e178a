"""Optimizers that multiply gradients by the inverse of a curvature matrix."""
