"""Where a loaded model computes: in the server's process, or in one of its own."""
