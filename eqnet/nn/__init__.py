"""The elastic network: a float model whose layers take any format of a space."""
