"""Text, from corpora and files to batches."""
