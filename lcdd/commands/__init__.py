"""One file for each `lcdd COMMAND`."""
