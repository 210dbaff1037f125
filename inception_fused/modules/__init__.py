"""FusedInception and GoogLeNet; the structure of any module, and how a block notices changes to its layers."""
