"""Benches: how often the study is right where the truth is known."""
