"""Paired two-choice items and their rendering with exact token spans."""
