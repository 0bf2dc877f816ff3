"""Two sources side by side: what differs, and what of that is more than noise."""
