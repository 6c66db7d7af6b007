"""Rounds of own images: what a round is, its store on disk, scores, people's labels, batches of what was selected."""
