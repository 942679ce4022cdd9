"""One mask for many edits: learning it, putting it over a model, judging it (arXiv 2605.28839)."""
