"""The harm-pressure study, one module a stage."""
