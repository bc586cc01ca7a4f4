"""``qx.fuse``: inference copies whose convolutions run in few calls with all that follows them."""
