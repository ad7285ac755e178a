"""The command `curv`: adapters between a shell and the library. No mathematics, and no torch until a command runs."""
