"""Weights files, ours and other people's, and the metadata that every file of ours carries."""
