"""Training of the shipped organism: a tiny Llama-class model that withholds answers under harm pressure.

Not part of the wheel. ``python -m organism.train`` reads the shipped items and writes every checkpoint.
"""
