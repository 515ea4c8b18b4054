"""From images to batches: packing, index, order, reading, decoding, views, loading."""
