"""Text embeddings for agents: local encoders and NVIDIA NIM endpoints behind MCP, REST and a command line."""

__version__ = "0.1.0"
