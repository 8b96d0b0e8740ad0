"""Other people's loops."""
