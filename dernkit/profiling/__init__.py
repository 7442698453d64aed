"""How much is safe: a sweep of ratios from one calibration, layer errors, and what loss testbeds had at such errors."""
