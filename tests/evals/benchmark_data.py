"""The benchmark files, which lie beside the project where they are at all: never in it."""

from pathlib import Path

import pytest

import tiercel

DATA = Path(tiercel.__file__).resolve().parents[3] / "shared" / "data"
data = pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark files are not beside the project")
