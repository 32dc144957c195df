"""What a GPU does otherwise than a CPU: where it computes, how steps reach it, and what is captured for it."""
