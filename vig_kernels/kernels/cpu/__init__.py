"""C++ kernels for CPUs, through the compiled module `vig_kernels._native`."""
