"""C++ kernels that make training faster on a CPU, and the layers that call them."""
