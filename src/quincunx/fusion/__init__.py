"""``qx.fuse``: inference copies that run each convolution together with the operations after it."""
