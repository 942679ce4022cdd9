"""What an edit did: what the model says (looks), how good that is (metrics), and the same in a sentence (text)."""
