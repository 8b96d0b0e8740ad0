"""`lcdd demo`: the whole method on a small embedded model."""
