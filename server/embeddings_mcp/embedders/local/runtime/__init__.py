"""Running a loaded model in the server's process or in a subprocess."""
