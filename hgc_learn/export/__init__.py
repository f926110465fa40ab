"""From the checkpoint of a training to a schedule."""
