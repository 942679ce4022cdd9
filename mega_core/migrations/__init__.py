"""How the notebook's tables came to be, one step per file in versions/; run by mega_core.notebook when it opens."""
