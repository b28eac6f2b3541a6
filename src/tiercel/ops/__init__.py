"""The mathematics that is worth a kernel.

Each file holds one idea: the formula and the shapes in a docstring, a slow `…_reference` that is
written to be believed, and the public function the network calls.  Here the public functions are
plain torch; native kernels will sit beside them under the same names.
"""
