"""The local encoder: the only package that uses torch and transformers.

From the rest of the project it imports only the errors, the model cards, the vectors, and modules without dependencies.
It imports neither pydantic nor a web framework, so it runs on a GPU machine where these are not installed.
"""
