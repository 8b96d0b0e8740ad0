"""Which claims hold, with the controls that a reader would ask for; bounds are in claims.yaml, fixed before any run."""
