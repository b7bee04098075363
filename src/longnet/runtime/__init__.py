"""What the project needs of torch and Triton: operators, launches, a cache that CUDA graphs may read. It knows no attention."""
