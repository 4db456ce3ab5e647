"""Another implementation's word: TransformerLens, in an environment of its own, against qklens on the same weights."""
