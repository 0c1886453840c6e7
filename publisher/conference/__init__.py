"""The domain: what a conference is, which changes it allows, and what is said about each of them. No HTTP here."""
