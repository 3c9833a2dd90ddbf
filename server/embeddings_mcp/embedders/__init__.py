"""Sources of embeddings, all behind one protocol."""
