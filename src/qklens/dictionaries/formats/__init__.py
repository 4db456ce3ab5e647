"""Dictionaries that other tools wrote, read without those tools: one small module a format.

Whatever the native form (`crosscoder`) does not have is folded into the weights where that is exact, and refused by
name where it is not. `detect` finds the format from the files.
"""
