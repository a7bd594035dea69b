"""The machine: BLAS, device, memory, processes, and the Hub."""
