"""Models that answer and are measured: generation, comparison, evaluation."""
