"""Forwards that assert; pytest would rewrite those of a test's own file."""


def asserted(m, x):
    """Of the size, in two ways."""
    assert x.size(2) % 4 == 0, f"height {x.size(2)} of {x.shape}"
    assert x.shape[3] >= 8
    return m.layers(x)


def careful(m, x):
    """Many times."""
    for size in range(20, 60):
        assert x.shape[2] != size, f"{size}"
    return m.layers(x)
