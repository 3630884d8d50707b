"""Sparse inference kernels for the CPU: C++ that runs programs of sparse convolutions and linear layers."""
