"""From int8 or float tensors to files that run without this project, and their speed."""
