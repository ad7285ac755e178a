"""What the loss looks like around the parameters, and between sets of them."""
