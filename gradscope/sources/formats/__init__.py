"""Files of one format each, read into a tree of tensors that stay where they are."""
