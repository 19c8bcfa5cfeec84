"""The package `neglog`: its public names, and what importing it needs."""

import pytest

import neglog
from tests.support.processes import python


def test_kernels_import_no_torch():
    code = (
        "import sys, numpy as np\n"
        "from neglog.kernels import nll_forward\n"
        "result = nll_forward(np.zeros((2, 4), 'f'), [0, 1])\n"
        "print(float(result.loss[0]), 'torch' in sys.modules)"
    )
    assert python(code).stdout == "1.3862943649291992 False\n"


def test_without_torch_the_functions_say_what_to_install():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import neglog, numpy as np\n"
        "print(neglog.kernels.nll_forward(np.zeros((1, 2), 'f'), [0]).loss)\n"
        "print([state.why for state in neglog.dispatch.describe() if state.name == 'torch'])\n"
        "neglog.cross_entropy"
    )
    result = python(code)
    assert "0.6931" in result.stdout
    assert "pip install torch" in result.stdout
    assert "ImportError: neglog.cross_entropy needs PyTorch: pip install" in result.stderr


def test_public_names():
    assert set(neglog.__all__) <= set(dir(neglog))
    for name in neglog.__all__:
        assert getattr(neglog, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'crossentropy'"):
        neglog.crossentropy  # noqa: B018
