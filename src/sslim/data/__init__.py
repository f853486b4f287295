"""Corpora: reading audio and features from any layout into one folder, labels, batches, and checks of them."""
