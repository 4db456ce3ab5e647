"""Tables that answer one question each, without a whole study: which heads, which pairs, which partners."""
