"""What a subject does: attention by span, heads, belief, pair terms, nulls and statistics."""
