"""What the machine code of the launches says: compiled without a GPU, disassembled, counted."""
