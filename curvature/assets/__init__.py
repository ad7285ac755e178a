"""Embedded models and data, so that every example and test of the package runs offline on something real."""
