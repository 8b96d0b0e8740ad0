"""Every family of decoders that transformers has and LCDD can mask, put through its paces."""
