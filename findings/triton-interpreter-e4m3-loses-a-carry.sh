#!/usr/bin/env bash
# triton 3.7.0, interpreter: a cast of float32 to float8e4nv whose rounding carries into the exponent gives half the
# value (1.95 becomes 1.0, 124.3 becomes 64), and numbers below 2^-6 are cut off instead of rounded.
# Needs Python 3.11 and a package registry; installs into a temporary folder, exits 0 while the behaviour is as described.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.7.0 numpy
cat >"$work/cast.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def cast(x, q, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(q + i, tl.load(x + i).to(tl.float8e4nv).to(tl.uint8, bitcast=True))


x = torch.tensor([1.5, 1.95, 124.34, 0.003])
q = torch.zeros(4, dtype=torch.uint8)
cast[(1,)](x, q, 4)
got, right = q.view(torch.float8_e4m3fn).float().tolist(), x.to(torch.float8_e4m3fn).float().tolist()
print("interpreter", got, "torch", right)
assert got == [1.5, 1.0, 64.0, 2**-9] and right == [1.5, 2.0, 128.0, 2**-8]
PY
TRITON_INTERPRET=1 "$work/venv/bin/python" "$work/cast.py"
