"""Native kernels for CPUs: `native` for products, norms and sums, `mixers` for sequences and states, `training`.

Tensors in, tensors out.  `capture` records a step of them and runs it again without Python.
"""
