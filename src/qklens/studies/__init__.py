"""Stages, journal and resume; the harm-pressure study."""
