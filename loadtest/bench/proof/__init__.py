"""The proof on one GPU, or on a CPU with small shapes: `make prove-gpu`."""
