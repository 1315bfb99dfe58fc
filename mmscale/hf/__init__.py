"""Read and write model folders in Hugging Face's format.

``layouts/`` has one module per model family. No module here imports ``transformers``.
"""
