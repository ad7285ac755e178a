"""What curvature says of training: one question a file."""
