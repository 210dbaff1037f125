"""A 3x3 max-pool of stride 2 as data: its sizes, and which pixel a tap names.

In one dimension window i begins at pixel 2 * i - padding and has three places. Where padding is 1, or the last window
reaches beyond the image (``ceil_mode``), places lie outside; every window has one inside.
"""

from __future__ import annotations

from typing import NamedTuple

WINDOW, STRIDE = 3, 2
"""Side of the window, and pixels from one window to the next."""

PADDINGS = (0, 1)
"""2 and more would make windows of padding alone, which PyTorch refuses."""


NO_TAP = 15
"""In the place of a window's tap where ReLU's gradient is 0."""


class PoolShape(NamedTuple):
    """n images of h x w pixels. ceil_mode: whether a window that begins inside the image may end outside."""

    n: int
    h: int
    w: int
    padding: int
    ceil_mode: bool = False

    @property
    def pooled(self) -> tuple[int, int]:
        """Height and width of the result, as PyTorch has them: not positive where the image is too small."""
        return self._windows(self.h), self._windows(self.w)

    @property
    def rows(self) -> int:
        """Pixels of all images."""
        return self.n * self.h * self.w

    @property
    def pooled_rows(self) -> int:
        """Windows of all images."""
        h, w = self.pooled
        return self.n * h * w

    @property
    def cells_of_image(self) -> tuple[int, int]:
        """Rows and columns of the squares of 2x2 pixels, the first at (-padding, -padding), that cover an image: see
        kernels/max_pool_grad.py."""
        return (self.h + self.padding + 1) // STRIDE, (self.w + self.padding + 1) // STRIDE

    @property
    def cells(self) -> int:
        """Such squares of all images."""
        h, w = self.cells_of_image
        return self.n * h * w

    def _windows(self, size: int) -> int:
        # ceil_mode drops a last window that begins outside the image. Of three pixels and stride 2 none does.
        return (size + 2 * self.padding - WINDOW + (STRIDE - 1) * self.ceil_mode) // STRIDE + 1
