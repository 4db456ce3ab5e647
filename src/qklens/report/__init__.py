"""What a reader sees of a finished study: one figure per stage, and one self-contained page around them.

Everything here is a function of `Results` and the manifest. Nothing loads a model, so a report can be redrawn anywhere.
"""
