"""Feature sources: what writes a residual vector as features, bias and error."""
