"""Layers that libraries really quantized, traced and rewritten: one small module for each library.

Each module has CASES: name -> a function that makes (model, x), and KEPT: name -> the Reason for what stays as it was.
`python -m tests.libraries [library ...]` prints what became of each of them.
"""
