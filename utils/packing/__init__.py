"""From int8 or float tensors to the smallest file, and back."""
