"""Triton kernels of the update rules; fastl2l/ops/triton.py checks arguments and launches them.

In a checkout they lie beside the package, once installed within it: always import them as ``fastl2l.kernels``.
"""
