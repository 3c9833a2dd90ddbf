"""``python -m embeddings_mcp`` is the ``embeddings-mcp`` command."""

from embeddings_mcp.faces.cli import main

if __name__ == "__main__":
    main()
