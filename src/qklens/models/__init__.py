"""Any causal language model: its sites, exact scores, reads and edits."""
