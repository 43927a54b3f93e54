"""fastl2l: learned optimizers, fast enough to use."""
