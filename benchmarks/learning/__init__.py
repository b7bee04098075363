"""Which pattern learns: small models trained alike but for their attention, and what they can do with far text."""
