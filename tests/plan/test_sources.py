"""Whether the kernels that were timed are still the same: code counts, words do not."""

import pytest

from inception_fused.plan.sources import PACKAGE, hash_of_kernels, kernel_sources, native_sources

KERNEL = """\"\"\"A kernel.\"\"\"
import triton


@triton.jit
def kernel(x, C: tl.constexpr):
    \"\"\"Words.\"\"\"
    # More words.
    return x * C
"""


@pytest.fixture
def package(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text(KERNEL)
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("# More words.", "# Other words, and\n    # more of them.", True),
        ("Words.", "What it does.", True),
        ("A kernel.", "K0: a kernel.", True),
        ("x * C", "x + C", False),
        ("tl.constexpr", "int", False),
        ("@triton.jit\n", "@triton.jit(noinline=True)\n", False),
    ],
)
def test_code_counts(package, old, new, same):
    before, path = hash_of_kernels(package), package / "kernels" / "a.py"
    assert old in KERNEL
    path.write_text(KERNEL.replace(old, new))
    assert (hash_of_kernels(package) == before) == same


def test_a_file_more_counts(package):
    before = hash_of_kernels(package)
    (package / "kernels" / "b.py").write_text(KERNEL)
    assert hash_of_kernels(package) != before


def test_the_package_has_both():
    assert kernel_sources() == hash_of_kernels(PACKAGE)
    assert len(native_sources()) == 64


def test_of_compiled_kernels_every_byte_counts(tmp_path):
    assert native_sources(tmp_path) is None, "an installed package has none"
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "toolchain.py").write_text("x = 1")
    assert native_sources(tmp_path) is None
    (tmp_path / "csrc" / "a.cu").write_text("// one")
    before = native_sources(tmp_path)
    (tmp_path / "csrc" / "a.cu").write_text("// two")
    assert native_sources(tmp_path) not in (before, None)
