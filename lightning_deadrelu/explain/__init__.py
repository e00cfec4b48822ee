"""Why units die: a check-up before training, and a post-mortem of those that died."""
