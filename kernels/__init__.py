"""The muscles: packed layouts, kernels and the custom ops that call them. They know nothing of FX graphs."""
