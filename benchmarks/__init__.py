"""Our costs as ratios, both sides of each measured in one run on one machine."""
