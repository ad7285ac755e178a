"""What inverses of matrices are for."""
