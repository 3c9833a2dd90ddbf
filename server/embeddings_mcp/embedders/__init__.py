"""Sources of vectors, one protocol for all."""
