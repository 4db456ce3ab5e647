"""Planted models: subjects whose mechanism is written into their weights, and the bench that runs the study on them."""
