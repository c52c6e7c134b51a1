"""Networks that read partly hidden tokens and a time, and predict the hidden tokens."""
