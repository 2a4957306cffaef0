"""From float weights and observed activations to int8 tensors."""
