"""Schema, tfrecord files and their index, sources, loader, tokenizer."""
