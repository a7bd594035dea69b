"""The machine: which BLAS serves, which device there is, how much memory."""
