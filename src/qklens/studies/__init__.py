"""The bench, what is chosen on it, journal and resume; the harm-pressure study, and tables of one question each."""
