"""What a GPU does otherwise than a CPU: where it computes, how steps reach it, how its SMs are shared, and how it fares."""
