"""All that is worth knowing of a model at a glance, on one page."""
