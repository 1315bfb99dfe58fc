"""Folders of Hugging Face: read as they lie on the disk, and written so that its libraries load them.

``layouts/`` has a file for each family. Nothing here needs ``transformers``.
"""
