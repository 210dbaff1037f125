"""One block as data: its sizes, parameters and views, the reference, what it may differ by, what is refused."""
