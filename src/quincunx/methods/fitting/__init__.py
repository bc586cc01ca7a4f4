"""How layers are fitted: moments of data, ranks, codebooks, masks; the settings that methods share."""
