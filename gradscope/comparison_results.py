"""What ``compare`` returns: frozen dataclasses of plain numbers, named as in the JSON."""
