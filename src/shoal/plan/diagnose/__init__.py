"""Which of the signs that call for more GPUs a live engine shows, read off its metrics."""
