"""Text: where it comes from, who gets which share, and how it becomes batches."""
