"""What to change, where, on which side; and the engine that runs it without waste."""
