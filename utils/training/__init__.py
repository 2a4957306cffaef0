"""The training loop, its optimizers, distillation, and kernels for the CPU."""
