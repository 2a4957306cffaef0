"""Weights files, ours and other people's, and the metadata in every file that we write."""
