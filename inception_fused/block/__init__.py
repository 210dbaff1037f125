"""One block as data: chains of convolutions, sizes, views, reference, tolerances, and which operands are refused."""
