"""Operations shared by mixers and feed-forwards.

Each file has the formula and the shapes in a docstring, a slow `…_reference`, and the public function the network
calls.  Public functions dispatch: native kernels on the CPU (`ops.cpu`), Triton on a GPU (`ops.triton`), else torch.
"""
