"""The laws, one module per kind; each has a function `laws` that returns them as checks."""
