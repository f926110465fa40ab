"""The frozen models: what they compute node by node, what it costs, and recognising them."""
