"""Floor 1: documents to token batches."""
