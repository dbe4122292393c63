"""The Triton kernels: attention statistics at the cost of attention, on CUDA (or in Triton's interpreter)."""
