"""Curvature matrices of an objective, one function each: Objective -> LinearOperator."""
