"""The local encoder: the only part that uses torch and transformers.

It imports nothing of the project but the embedder protocol, the errors and the model cards, and of other packages only
numpy, torch, transformers, tokenizers and safetensors, so that it runs on a GPU machine without a web stack.
"""
