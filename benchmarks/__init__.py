"""Speed and memory beside a dense layer of the same active size.

Each module is a command: `python -m benchmarks.layer --help`.
"""
