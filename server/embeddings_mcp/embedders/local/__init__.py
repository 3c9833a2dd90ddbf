"""The local encoder: the only part that uses torch and transformers.

It imports nothing of the project but the errors, the model cards, vectors and what imports nothing itself, and neither
pydantic nor a web stack, so that it runs on a GPU machine without them.
"""
