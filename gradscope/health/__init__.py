"""Whether a run or a checkpoint is healthy: rules with limits, and what they are judged by."""
