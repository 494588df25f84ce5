"""The single measurements of benchmarks/gpu.py, a file for each subject."""
