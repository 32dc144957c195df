"""Pictures: from the bytes of a file to checked pixels, within bounds of size, memory and time."""
