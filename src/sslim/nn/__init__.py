"""Building blocks that know nothing of speech: attention, positions, blocks, the encoder, heads, and the slicing rule."""
