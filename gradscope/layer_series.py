"""What a run shows of each layer over its steps, as series: norms, updates, and the shape of the spectrum."""
