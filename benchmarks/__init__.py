"""What pgebus costs, as ratios measured in one run, because machines are noisy. Run by hand; no test depends on it."""
