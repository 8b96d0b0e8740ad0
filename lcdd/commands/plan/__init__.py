"""`lcdd plan`: predicted memory and time."""
