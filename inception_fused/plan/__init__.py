"""Which launches a block has, which implementation and tile each takes, what it should cost. Launches nothing."""
