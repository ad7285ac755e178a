"""The matrices that gradients are multiplied by: a family a file, each with its optimizers."""
