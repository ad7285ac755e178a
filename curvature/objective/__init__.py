"""The function that is studied: a model, a loss, the parameters where we stand, and the data."""
